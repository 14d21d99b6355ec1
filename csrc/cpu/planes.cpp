// rvae_fast::planes on the CPU: for each row, the nearest of some reference rows, exactly, its squared distance from the
// plane through them and its mean distance to the first of them. The contract is in rvae_fast/ops/planes.py.
//
// One pass over the reference rows, which is a product: with Q orthonormal directions, a = Q^T h and b = Q^T f,
//   |h - f|^2 >= |h|^2 + (|f|^2 - 2 a.b - 2 R(h) R(f)),   R the length of what lies outside of the directions,
// and at most 4 R(h) R(f) more. The `neighbours`-th smallest upper bound so far says which rows can still be among the
// nearest; these alone are remembered, in the end compared in full, those first that come first by their lower bound, until
// the next one's lower bound lies beyond what was found. Nothing of the size of the reference is written.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/cpu_features.h"
#include "cpu/planes_kernels.h"
#include "cpu/score_tile.h"

namespace rvae::cpu::planes {

namespace {

constexpr int64_t kTileRows = 64;  // look at a panel together, while it is in the cache
constexpr int64_t kNearest = 10;   // rvae_fast/_planes.py: NEAREST
constexpr double kSame = 1e-6;     // likewise: SAME
constexpr float kSlack = 1e-5f;    // of the squared lengths: what rounding may add to a bound, a few hundred roundings
constexpr size_t kCandidates = 1024, kAhead = 4;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

const Kernels& kernels() {
  return RVAE_IF_AVX512(avx512_kernels, RVAE_IF_AVX2(avx2_kernels, portable_kernels));
}

struct Reference {
  const float *rows, *middle, *axes, *panels;  // axes: null where the directions are the columns
  int64_t count, width, directions, neighbours;
  float longest;  // the largest squared length
  double penalty;
  bool own;  // whether the rows sought are made of these

  int64_t depth() const { return directions + 2; }
  int64_t stride() const { return stack::round_up(width, 16); }
};

struct Found {
  double *squared, *mean;
  int64_t* nearest;
};

struct Candidate {
  float value;  // a bound, or a squared distance
  int64_t row;
  bool operator<(const Candidate& other) const { return value < other.value || (value == other.value && row < other.row); }
};

// The rows that may be among a row's `wanted` nearest.
class Candidates {
 public:
  void begin(int64_t wanted, float outside, float slack, bool finite) {
    wanted_ = static_cast<size_t>(wanted), outside_ = outside, slack_ = slack, room_ = kCandidates;
    limit_ = finite ? kInfinity : -kInfinity;  // a row that is not finite has no candidates
    found_.clear(), uppers_.clear();
  }
  float limit() const { return limit_; }

  // A row by its lower bound and -2 times its length outside of the directions.
  void add(float lower, int64_t row, float outside) {
    if (found_.size() == room_) {
      compact();
      room_ = std::max(room_, 2 * found_.size());
    }
    found_.push_back({lower, row});
    const float upper = lower - 2.0f * outside_ * outside + 2.0f * slack_;
    if (uppers_.size() < wanted_) {
      uppers_.push_back(upper);
      std::push_heap(uppers_.begin(), uppers_.end());
    } else if (upper < uppers_.front()) {
      std::pop_heap(uppers_.begin(), uppers_.end());
      uppers_.back() = upper;
      std::push_heap(uppers_.begin(), uppers_.end());
    }
    if (uppers_.size() == wanted_) limit_ = uppers_.front();
  }

  // Those that are left, the nearest by their bounds first.
  const std::vector<Candidate>& sorted() {
    compact();
    std::sort(found_.begin(), found_.end());
    return found_;
  }

 private:
  void compact() {
    found_.erase(std::remove_if(found_.begin(), found_.end(), [this](const Candidate& c) { return !(c.value <= limit_); }),
                 found_.end());
  }

  size_t wanted_ = 0, room_ = 0;
  float outside_ = 0, slack_ = 0, limit_ = 0;
  std::vector<Candidate> found_;
  std::vector<float> uppers_;
};

// x for which matrix x = right, in place of `right`; `matrix` [n, n], its lower triangle, becomes its Cholesky factor.
void solve(std::vector<double>& matrix, std::vector<double>& right, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    double* const row = matrix.data() + i * n;
    for (int64_t j = 0; j <= i; ++j) {
      const double* const other = matrix.data() + j * n;
      double sum = row[j];
      for (int64_t k = 0; k < j; ++k) sum -= row[k] * other[k];
      row[j] = i == j ? std::sqrt(sum) : sum / other[j];
    }
    double sum = right[i];
    for (int64_t k = 0; k < i; ++k) sum -= row[k] * right[k];
    right[i] = sum / row[i];
  }
  for (int64_t i = n - 1; i >= 0; --i) {
    right[i] /= matrix[i * n + i];
    for (int64_t k = 0; k < i; ++k) right[k] -= matrix[i * n + k] * right[i];
  }
}

class Look {
 public:
  Look(const Reference& reference, const Found& out)
      : ref_(reference), out_(out), kernels_(kernels()), stride_(reference.stride()), candidates_(kTileRows),
        centred_(kTileRows * stride_), across_(kBlock * reference.width), sought_(kTileRows * reference.depth()),
        squares_(kTileRows), around_(reference.neighbours * stride_), products_(reference.neighbours * reference.neighbours),
        right_(reference.neighbours), point_(reference.neighbours), matrix_(products_.size()), solution_(right_.size()) {}

  void run(const float* h, int64_t first, int64_t count) {
    const int64_t blocks = at::divup(count, kBlock), depth = ref_.depth();
    for (int64_t b = 0; b < blocks; ++b) prepare(h + (first + b * kBlock) * ref_.width, b, std::min(kBlock, count - b * kBlock));
    const int64_t panels = at::divup(ref_.count, kPanel);
    float bounds[kBlock * kPanel], limits[kBlock];
    uint32_t hits[kBlock];
    for (int64_t p = 0; p < panels; ++p) {
      const float* const panel = ref_.panels + p * depth * kPanel;
      const int64_t beyond = std::max<int64_t>(0, (p + 1) * kPanel - ref_.count);
      const uint32_t there = ~uint32_t{0} >> beyond;
      for (int64_t b = 0; b < blocks; ++b) {
        for (int64_t r = 0; r < kBlock; ++r) limits[r] = candidates_[b * kBlock + r].limit();
        if (!kernels_.product(panel, depth, sought_.data() + b * depth * kBlock, limits, bounds, hits)) continue;
        for (int64_t r = 0; r < kBlock; ++r) {
          Candidates& own = candidates_[b * kBlock + r];
          for (uint32_t left = hits[r] & there; left != 0; left &= left - 1) {
            const int64_t c = __builtin_ctz(left);
            if (bounds[r * kPanel + c] <= own.limit()) {  // which falls
              own.add(bounds[r * kPanel + c], p * kPanel + c, panel[(depth - 1) * kPanel + c]);
            }
          }
        }
      }
    }
    for (int64_t r = 0; r < count; ++r) finish(r, first + r);
  }

 private:
  // Up to kBlock rows about the middle, and what is multiplied with the panels: their directions, 1, their length outside.
  void prepare(const float* h, int64_t block, int64_t count) {
    const int64_t width = ref_.width, directions = ref_.directions;
    float* const sought = sought_.data() + block * ref_.depth() * kBlock;
    for (int64_t r = 0; r < kBlock; ++r) {
      float* const own = centred_.data() + (block * kBlock + r) * stride_;
      double squares = 0;
      for (int64_t i = 0; i < width; ++i) {
        own[i] = r < count ? h[r * width + i] - ref_.middle[i] : 0.0f;
        squares += static_cast<double>(own[i]) * own[i];
        across_[i * kBlock + r] = own[i];
      }
      std::fill(own + width, own + stride_, 0.0f);
      squares_[block * kBlock + r] = static_cast<float>(squares);
    }
    if (ref_.axes == nullptr) {
      std::copy(across_.begin(), across_.end(), sought);
    } else {
      float along[kBlock * kPanel], limits[kBlock];
      uint32_t hits[kBlock];
      std::fill_n(limits, kBlock, -kInfinity);
      for (int64_t d = 0; d < directions; d += kPanel) {
        kernels_.product(ref_.axes + d * width, width, across_.data(), limits, along, hits);
        for (int64_t j = 0; j < std::min(kPanel, directions - d); ++j) {
          for (int64_t r = 0; r < kBlock; ++r) sought[(d + j) * kBlock + r] = along[r * kPanel + j];
        }
      }
    }
    for (int64_t r = 0; r < kBlock; ++r) {
      const float squares = squares_[block * kBlock + r];
      float outside = 0.0f;
      if (ref_.axes != nullptr) {  // at least what it is: the bounds hold for any greater length
        double rest = static_cast<double>(squares) * (1.0 + 1e-6);
        for (int64_t d = 0; d < directions; ++d) rest -= static_cast<double>(sought[d * kBlock + r]) * sought[d * kBlock + r];
        outside = static_cast<float>(std::sqrt(std::max(rest, 0.0)));
      }
      sought[directions * kBlock + r] = 1.0f;
      sought[(directions + 1) * kBlock + r] = outside;
      candidates_[block * kBlock + r].begin(ref_.neighbours + 1, outside, kSlack * (squares + ref_.longest),
                                              r < count && std::isfinite(squares));
    }
  }

  void finish(int64_t r, int64_t row) {
    const int64_t k = ref_.neighbours;
    const float* const h = centred_.data() + r * stride_;
    const float squares = squares_[r], slack = kSlack * (squares + ref_.longest);
    nearest_.clear();
    const auto& candidates = candidates_[r].sorted();
    for (size_t i = 0; i < candidates.size(); ++i) {
      if (i + kAhead < candidates.size()) __builtin_prefetch(ref_.rows + candidates[i + kAhead].row * ref_.width);
      const bool full = static_cast<int64_t>(nearest_.size()) > k;
      if (full && candidates[i].value + (squares - slack) > nearest_.front().value) break;
      const Candidate found{kernels_.squared_distance(h, ref_.rows + candidates[i].row * ref_.width, ref_.width),
                            candidates[i].row};
      if (full) {
        if (!(found < nearest_.front())) continue;
        std::pop_heap(nearest_.begin(), nearest_.end());
        nearest_.back() = found;
      } else {
        nearest_.push_back(found);
      }
      std::push_heap(nearest_.begin(), nearest_.end());
    }
    std::sort(nearest_.begin(), nearest_.end());
    int64_t* const which = out_.nearest + row * k;
    double total = 0;
    for (const Candidate& c : nearest_) total += c.value;
    if (static_cast<int64_t>(nearest_.size()) <= k || !std::isfinite(total)) {  // a row that is not finite has no neighbours
      std::fill_n(which, k, 0);
      out_.squared[row] = out_.mean[row] = std::numeric_limits<double>::quiet_NaN();
      return;
    }
    const int64_t itself = ref_.own || nearest_.front().value <= kSame * total / static_cast<double>(k + 1) ? 1 : 0;
    const int64_t first = std::min(k, kNearest);
    double apart = 0;
    for (int64_t i = 0; i < k; ++i) {
      which[i] = nearest_[i + itself].row;
      if (i < first) apart += std::sqrt(static_cast<double>(nearest_[i + itself].value));
    }
    out_.mean[row] = apart / static_cast<double>(first);
    out_.squared[row] = from_plane(which, centred_.data() + r * stride_);
  }

  double from_plane(const int64_t* which, float* target) {
    const int64_t k = ref_.neighbours;
    kernels_.gather(ref_.rows, ref_.width, which, k, around_.data(), stride_, target);
    kernels_.products(around_.data(), k, stride_, target, products_.data(), right_.data());
    double trace = 0;
    for (int64_t i = 0; i < k; ++i) trace += products_[i * k + i];
    const double weight = ref_.penalty * trace / static_cast<double>(k) + std::numeric_limits<float>::min();
    std::copy(products_.begin(), products_.end(), matrix_.begin());
    std::copy(right_.begin(), right_.end(), solution_.begin());
    for (int64_t i = 0; i < k; ++i) matrix_[i * k + i] += weight;
    solve(matrix_, solution_, k);
    std::copy(solution_.begin(), solution_.end(), point_.begin());
    return kernels_.residual(around_.data(), k, stride_, target, point_.data());
  }

  const Reference& ref_;
  const Found out_;
  const Kernels& kernels_;
  const int64_t stride_;
  std::vector<Candidates> candidates_;
  std::vector<float> centred_, across_, sought_, squares_, around_, products_, right_, point_;
  std::vector<double> matrix_, solution_;
  std::vector<Candidate> nearest_;
};

void check(const char* name, const at::Tensor& t, at::IntArrayRef sizes) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, "planes: ", name, " must be float32, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.sizes() == sizes && t.is_contiguous(), "planes: ", name, " must be contiguous and have shape ", sizes, ", got ",
                    t.sizes());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> look(const at::Tensor& h, const at::Tensor& rows, const at::Tensor& middle,
                                                    const std::optional<at::Tensor>& axes, const at::Tensor& panels,
                                                    int64_t directions, double longest, int64_t neighbours, double penalty,
                                                    bool own) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && h.dim() == 2, "planes: h and rows must be matrices, got ", h.sizes(), " and ", rows.sizes());
  const int64_t n = h.size(0), m = rows.size(0), width = rows.size(1);
  check("h", h, {n, width});
  check("rows", rows, {m, width});
  check("middle", middle, {width});
  check("panels", panels, {at::divup(m, kPanel), directions + 2, kPanel});
  if (axes.has_value()) {
    check("axes", *axes, {at::divup(directions, kPanel), width, kPanel});
  } else {
    TORCH_CHECK_VALUE(directions == width, "planes: without axes there must be ", width, " directions, got ", directions);
  }
  TORCH_CHECK_VALUE(neighbours >= 1 && neighbours < m, "planes: neighbours must be at least 1 and less than the ", m,
                    " rows, got ", neighbours);
  const auto options = h.options().dtype(at::kDouble);
  at::Tensor squared = at::empty({n}, options), mean = at::empty({n}, options);
  at::Tensor nearest = at::empty({n, neighbours}, options.dtype(at::kLong));
  if (n == 0) return {squared, mean, nearest};
  const Reference reference{rows.const_data_ptr<float>(), middle.const_data_ptr<float>(),
                            axes.has_value() ? axes->const_data_ptr<float>() : nullptr, panels.const_data_ptr<float>(),
                            m, width, directions, neighbours, static_cast<float>(longest), penalty, own};
  const Found out{squared.data_ptr<double>(), mean.data_ptr<double>(), nearest.data_ptr<int64_t>()};
  const stack::Partition part(n, kTileRows, m * (directions + 2));
  stack::for_chunks(part, [&](int64_t chunk) {
    Look own(reference, out);
    for (int64_t t = part.first_tile(chunk); t < part.first_tile(chunk + 1); ++t) {
      own.run(h.const_data_ptr<float>(), part.begin(t), part.count(t));
    }
  });
  return {squared, mean, nearest};
}

}  // namespace

TORCH_LIBRARY_IMPL(rvae_fast, CPU, m) {
  m.impl("planes", look);
}

}  // namespace rvae::cpu::planes
