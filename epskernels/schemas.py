"""The schemas of torch.ops.epskernels.*, written here alone, as torch.library reads them.

ops.py defines them in Python. For programs without Python the build puts the same text into libepskernels.so
(csrc/standalone.cpp): run as a script, this file prints it as C++ string literals. It imports nothing.

Two rules. A new optional argument comes last of its kind: exported programs give theirs by position, and would give them to
another in silence. A number is never keyword-only with a default: AOTInductor (torch 2.13) leaves such a one out of the
description of a call and not out of the call, which then fails.
"""

_INPUTS = (
    "Tensor f, Tensor rows, Tensor index, Tensor? u=None, Tensor? m1=None, Tensor? m2=None, Tensor? v=None, Tensor? grad=None, "
    "Tensor? noise=None, Tensor? seeds=None, Tensor? y=None, Tensor? rescale=None, Tensor? threshold=None"
)
_OUTPUTS = "Tensor(b!)? m0=None, Tensor(c!)? y_out=None, Tensor(d!)? model_input=None"
SCHEMAS = (
    f"step(Tensor x, {_INPUTS}) -> Tensor",
    f"step_m0(Tensor x, {_INPUTS}) -> (Tensor, Tensor)",
    f"step_y(Tensor x, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    # As step without its optional inputs: to find them absent takes a quarter of the host time of a step of a small latent.
    "step_plain(Tensor x, Tensor f, Tensor rows, Tensor index) -> Tensor",
    f"step_out(Tensor x, {_INPUTS}, *, Tensor(a!) out, {_OUTPUTS}) -> ()",
    f"step_(Tensor(a!) x, {_INPUTS}, *, {_OUTPUTS}) -> ()",
    "moments(Tensor f, Tensor? u=None, Tensor? rows=None, Tensor? index=None) -> Tensor",
    "normal(Tensor seeds, SymInt[] shape, ScalarType dtype, int draw=0, int stream=1) -> Tensor",
)

if __name__ == "__main__":
    print("".join(f'R"({schema})",\n' for schema in SCHEMAS), end="")
