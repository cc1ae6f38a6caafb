// Softmax of attention scores and its derivative for CPUs; called through cpu_attention.py.
#include <pybind11/pybind11.h>

#include "vector_math.h"

PYBIND11_MODULE(attention_kernels, module) { module.doc() = "Kernels of attention on CPUs."; }
