// How arguments arrive from Python: tensors as addresses, choices as codes.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

using Address = std::uintptr_t;
using Addresses = std::vector<Address>;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

template <class T>
std::vector<T*> pointers(const Addresses& addresses) {
    std::vector<T*> result;
    for (const Address address : addresses) result.push_back(pointer<T>(address));
    return result;
}

template <class Enum>
Enum enumerator(std::int64_t code, Enum last) {
    if (code < 0 || code > static_cast<std::int64_t>(last)) throw std::invalid_argument("unknown code");
    return static_cast<Enum>(code);
}
