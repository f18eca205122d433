#pragma once

#include <pybind11/pybind11.h>

void bind_flow_penalties(pybind11::module_& m);
