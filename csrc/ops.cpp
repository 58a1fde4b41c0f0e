// Schemas of the native operators. Implementations register themselves per device in cpu/ and cuda/.
// Loading this library is all that it takes: it is no Python module and needs no Python headers.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

TORCH_LIBRARY(psilora, m) { m.def("spd_solve(Tensor gram, Tensor rhs) -> (Tensor solution, Tensor info)"); }

// An optimizer step is not differentiated: a backward through it raises instead of giving a silent zero.
TORCH_LIBRARY_IMPL(psilora, Autograd, m) {
  m.impl("spd_solve", torch::autograd::autogradNotImplementedFallback());
}
