// Elementwise operations of the model for CPUs.
#include <pybind11/pybind11.h>

#include "vector_math.h"

PYBIND11_MODULE(elementwise_kernels, module) { module.doc() = "Elementwise kernels for CPUs."; }
