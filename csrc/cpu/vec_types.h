// Element types of the vector code. They stand for torch's own in files that may include no torch header.
#pragma once

#include <cstdint>
#include <cstring>

namespace rvae::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

}  // namespace rvae::cpu
