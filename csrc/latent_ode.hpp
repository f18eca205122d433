#pragma once

#include <pybind11/pybind11.h>

void bind_latent_ode(pybind11::module_& m);
