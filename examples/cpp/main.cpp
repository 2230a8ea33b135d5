// Samples without Python: one model call and one step for each row of a table.
//
//     sampler JOB OUT            the ops called directly, around a stand-in for a model, f = 0.1*x
//     sampler JOB OUT PACKAGE    model and step as one package of AOTInductor, called as (x, index, seeds) -> x'
//
// JOB: torch.save of {"rows", "initial_sigma", "seeds", "shape"}. OUT: the samples, for torch.load.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <vector>

using at::Tensor;

// A torch op by its name, its arguments by theirs; the others take their defaults. A server looks the op up once.
Tensor call(const char* name, const std::map<std::string, c10::IValue>& given) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  torch::jit::Stack stack;
  size_t used = 0;
  for (const c10::Argument& argument : op.schema().arguments()) {
    const auto found = given.find(argument.name());
    TORCH_CHECK(found != given.end() || argument.default_value(), name, ": argument ", argument.name(), " is missing");
    used += found != given.end();
    stack.push_back(found != given.end() ? found->second : *argument.default_value());
  }
  TORCH_CHECK(used == given.size(), name, ": got an argument that it does not have: ", op.schema());
  op.callBoxed(stack);
  return stack.at(0).toTensor();
}

std::vector<char> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write(const char* path, const std::vector<char>& bytes) {
  std::ofstream file(path, std::ios::binary);
  TORCH_CHECK(file.write(bytes.data(), bytes.size()).flush(), "cannot write ", path);
}

void sample(const char* job_path, const char* out_path, const char* package_path) {
  const auto job = torch::jit::pickle_load(read(job_path)).toGenericDict();
  const Tensor rows = job.at("rows").toTensor(), seeds = job.at("seeds").toTensor();
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> package;
  if (package_path) package = std::make_unique<torch::inductor::AOTIModelPackageLoader>(package_path);

  Tensor x = call("epskernels::normal", {{"seeds", seeds}, {"shape", job.at("shape")}, {"dtype", at::kFloat}});
  x = x * job.at("initial_sigma").toDouble();
  const Tensor index = at::arange(rows.size(0), rows.options().dtype(at::kLong));
  for (int64_t i = 0; i < rows.size(0); ++i) {
    if (package) {
      x = package->run({x, index[i], seeds}).at(0);
    } else {
      const Tensor f = x * 0.1;
      x = call("epskernels::step", {{"x", x}, {"f", f}, {"rows", rows}, {"index", index[i]}, {"seeds", seeds}});
    }
  }
  write(out_path, torch::jit::pickle_save(x));
}

int main(int argc, char** argv) {
  if (argc != 3 && argc != 4) return std::fprintf(stderr, "usage: sampler JOB OUT [PACKAGE]\n"), 2;
  try {
    const at::NoGradGuard no_grad;
    sample(argv[1], argv[2], argc == 4 ? argv[3] : nullptr);
  } catch (const c10::Error& error) {
    return std::fprintf(stderr, "sampler: %s\n", error.what_without_backtrace()), 1;
  } catch (const std::exception& error) {
    return std::fprintf(stderr, "sampler: %s\n", error.what()), 1;
  }
}
