// The Python module rvae_fast._C: facts about the build and the CPU. The ops are not here: every file under csrc/cpu and
// csrc/cuda registers its own with the dispatcher when the module is loaded.
#include <pybind11/pybind11.h>

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <string>
#include <vector>

#include "build_facts.h"
#include "cpu/cpu_features.h"

namespace py = pybind11;

namespace {

py::object text_or_none(const char* text) {
  return *text != '\0' ? py::object(py::str(text)) : py::object(py::none());
}

// The instruction sets that this CPU and operating system offer, of those the library has code for.
std::vector<std::string> cpu_instruction_sets() {
  std::vector<std::string> found;
  if (rvae::cpu::has_avx2()) found.emplace_back("avx2");
  if (rvae::cpu::has_avx512()) found.emplace_back("avx512");
  if (rvae::cpu::has_avx512_bf16()) found.emplace_back("avx512bf16");
  if (rvae::cpu::has_amx_bf16()) found.emplace_back("amx");
  return found;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = RVAE_FACT_COMPILER;
  info["flags"] = RVAE_FACT_FLAGS;
  info["torch"] = RVAE_FACT_TORCH;
  info["torch_cuda"] = text_or_none(RVAE_FACT_TORCH_CUDA);
  info["cuda"] = text_or_none(RVAE_FACT_CUDA);
  info["openmp"] = RVAE_FACT_OPENMP;
  info["isa_compiled"] = RVAE_FACT_ISA_COMPILED;
  info["sanitize"] = text_or_none(RVAE_FACT_SANITIZE);
#ifdef _GLIBCXX_USE_CXX11_ABI
  info["cxx11_abi"] = static_cast<int>(_GLIBCXX_USE_CXX11_ABI);
#else
  info["cxx11_abi"] = py::none();
#endif
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  py::list isa;
  for (const auto& name : cpu_instruction_sets()) isa.append(name);
  info["isa_cpu"] = isa;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native half of rvae_fast: importing it registers the CPU (and CUDA) implementations of its ops.";
  m.def("build_info", &build_info, "What this module was built with and for, and the CPU's instruction sets.");
  m.def("num_threads", &at::get_num_threads, "Threads that the ops use, as the module itself sees them.");
}
