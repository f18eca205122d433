#pragma once

#include <pybind11/pybind11.h>

void bind_ntk_gram(pybind11::module_& m);
