#!/usr/bin/env bash
# Builds the CPU library, and the CUDA kernel's source for the host, with AddressSanitizer and UndefinedBehaviorSanitizer into build/sanitize and runs the fuzzer and
# the bit tests under them. Any report ends the process that made it, and this script with an error.
# The installed package stays as it is: a copy of its Python files stands beside the sanitized libraries.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python}
build=$root/build/sanitize
package=$build/package

rm -rf "$package"
mkdir -p "$package/epskernels"
(cd "$root/epskernels" && tar -cf - --exclude='*.so' --exclude=__pycache__ .) | tar -xf - -C "$package/epskernels"

# What setup.py finds, without importing torch.
torch_dir=$("$python" -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])")
cmake -S "$root" -B "$build/cmake" -G Ninja --log-level=WARNING \
  -DCMAKE_INSTALL_PREFIX="$package/epskernels" \
  -DPython_EXECUTABLE="$(command -v "$python")" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
  -DEPSKERNELS_TORCH_DIR="$torch_dir" \
  -DEPSKERNELS_SANITIZE=address,undefined
cmake --build "$build/cmake" --target install

# The sanitizers' own library must be the first one loaded; libstdc++ next, so that they find its __cxa_throw.
compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' "$build/cmake/CMakeCache.txt")
runtime=$(for name in libasan.so libubsan.so libstdc++.so; do readlink -f "$("$compiler" -print-file-name=$name)"; done)
checked() {
  env PYTHONPATH="$package:$root" PYTHONSAFEPATH=1 LD_PRELOAD="${runtime//$'\n'/ }" \
    ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:allocator_may_return_null=1 \
    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 EPSKERNELS_SANITIZE=address,undefined "$@"
}

# Imported first of all by every process below: it proves that the sanitized build is what they test.
cat > "$package/sanitized.py" << 'EOF'
import pathlib

import epskernels

HERE = pathlib.Path(__file__).resolve().parent / "epskernels"
library = HERE / "libepskernels_cpu.so"
loaded = {line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps") if "/" in line}
assert pathlib.Path(epskernels.build.extension().__file__).parent == HERE, epskernels.build.extension().__file__
assert str(library) in loaded, "the sanitized library is not loaded"
others = [path for path in loaded if path.endswith("/libepskernels_cpu.so") and path != str(library)]
assert not others, f"{others} is loaded too"
assert any("libasan" in path for path in loaded), "AddressSanitizer is not loaded"
for symbol in (b"__asan_report_load4", b"__ubsan_handle_"):
    assert symbol in library.read_bytes(), f"{library} was built without {symbol.decode()}"
EOF
checked "$python" -m sanitized

tests=()
for name in test_fuzz test_bad_input test_step_bits test_rows_on_device test_guidance; do
  [[ -e $root/tests/ops/$name.py ]] && tests+=("$root/tests/ops/$name.py")
done
cd "$build"
options=(-c "$root/pyproject.toml" --rootdir "$root" -p sanitized -p no:cacheprovider -x -m "")
checked "$python" -m pytest "${options[@]}" -k "not triton and not ptx" "${tests[@]}"
echo "sanitize: no report"
