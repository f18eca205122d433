#pragma once

#include <pybind11/pybind11.h>

void bind_gaussian_warp(pybind11::module_& m);
