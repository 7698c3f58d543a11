// What options hold per pair, by lanes.
//
// Dropout's counter rule: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy
// as 1, 2, 3", SC 2011), of which only the first word of each block is needed.

#include "hwy/highway.h"
#include "kernels/kernel_table.h"
#include "kernels/tile-inl.h"

ANNULUS_PUSH_TARGET
namespace annulus {
namespace HWY_NAMESPACE {
namespace {

using Word = hn::VFromD<U>;

constexpr std::uint32_t kPhiloxM0 = 0xD2511F53U, kPhiloxM1 = 0xCD9E8D57U;
constexpr std::uint32_t kPhiloxW0 = 0x9E3779B9U, kPhiloxW1 = 0xBB67AE85U;

// High and low halves of a * m.
HWY_INLINE void WideMultiply(Word a, std::uint32_t m, Word& high, Word& low) {
#if HWY_TARGET == HWY_SCALAR
  const std::uint64_t product = std::uint64_t{a.raw} * m;
  high = hn::Set(kU, static_cast<std::uint32_t>(product >> 32));
  low = hn::Set(kU, static_cast<std::uint32_t>(product));
#else
  const hn::Repartition<std::uint64_t, U> wide;
  const Word factor = hn::Set(kU, m);
  const auto even = hn::MulEven(a, factor);
  const auto odd = hn::MulEven(hn::BitCast(kU, hn::ShiftRight<32>(hn::BitCast(wide, a))), factor);
  low = hn::OddEven(hn::BitCast(kU, hn::ShiftLeft<32>(odd)), hn::BitCast(kU, even));
  high = hn::OddEven(hn::BitCast(kU, odd), hn::BitCast(kU, hn::ShiftRight<32>(even)));
#endif
}

struct Counter {
  Word x[4];
};

HWY_INLINE void PhiloxRound(Counter& c, std::uint32_t k0, std::uint32_t k1) {
  Word high0, low0, high1, low1;
  WideMultiply(c.x[0], kPhiloxM0, high0, low0);
  WideMultiply(c.x[2], kPhiloxM1, high1, low1);
  c.x[0] = hn::Xor(hn::Xor(high1, c.x[1]), hn::Set(kU, k0));
  c.x[1] = low1;
  c.x[2] = hn::Xor(hn::Xor(high0, c.x[3]), hn::Set(kU, k1));
  c.x[3] = low0;
}

// Counter words are batch, head, query, key. Heads and queries differ by lane only and keys by row
// only, which leaves half of the first three rounds out of the loop over keys: after round 2 words
// 2 and 3 depend on the lane alone, words 0 and 1 on lane xor row.
inline void KeepBits(const DropoutRows& rows, const std::int64_t* keys, std::int64_t num_keys,
                     std::uint32_t* bits) {
  std::uint32_t k0[10], k1[10];
  k0[0] = static_cast<std::uint32_t>(rows.seed),
  k1[0] = static_cast<std::uint32_t>(rows.seed >> 32);
  for (int i = 1; i < 10; ++i) k0[i] = k0[i - 1] + kPhiloxW0, k1[i] = k1[i - 1] + kPhiloxW1;
  const std::uint64_t batch = std::uint64_t{kPhiloxM0} * rows.batch;
  const auto batch_high = static_cast<std::uint32_t>(batch >> 32),
             batch_low = static_cast<std::uint32_t>(batch);
  alignas(64) std::uint32_t lane0[kWidth] = {}, lane1[kWidth] = {};
  for (std::int64_t n = 0; n < rows.count; ++n) {  // round 1, words 0 and 1
    const std::uint64_t product =
        std::uint64_t{kPhiloxM1} * static_cast<std::uint32_t>(rows.query[n]);
    lane0[n] = static_cast<std::uint32_t>(product >> 32) ^
               static_cast<std::uint32_t>(rows.head[n]) ^ k0[0];
    lane1[n] = static_cast<std::uint32_t>(product);
  }
  const bool never = rows.threshold == 0;
  const Word last = hn::Set(kU, static_cast<std::uint32_t>(rows.threshold - (never ? 0 : 1)));
  for (int c = 0; c < kVecs; ++c) {
    Word high, low;  // of round 2's product of word 0: rounds 1 and 2 of words 2 and 3
    WideMultiply(hn::Load(kU, lane0 + c * kLanes), kPhiloxM0, high, low);
    const Word two = hn::Xor(high, hn::Set(kU, batch_low ^ k1[1])), three = low;
    const Word one = hn::Load(kU, lane1 + c * kLanes);
    for (std::int64_t k = 0; k < num_keys; ++k) {
      const std::uint64_t product =
          std::uint64_t{kPhiloxM1} * (batch_high ^ static_cast<std::uint32_t>(keys[k]) ^ k1[0]);
      Counter counter{{hn::Xor(one, hn::Set(kU, static_cast<std::uint32_t>(product >> 32) ^ k0[1])),
                       hn::Set(kU, static_cast<std::uint32_t>(product)), two, three}};
      ANNULUS_UNROLL for (int i = 2; i < 10; ++i) PhiloxRound(counter, k0[i], k1[i]);
      // Kept iff the word is above the last one that drops; unsigned, so both are flipped.
      const auto flip = hn::Set(kU, 0x80000000U);
      const auto kept = hn::Gt(hn::BitCast(kI, hn::Xor(counter.x[0], flip)),
                               hn::BitCast(kI, hn::Xor(last, flip)));
      const std::uint32_t mask = never ? ~0U : MaskBits(hn::RebindMask(kF, kept)) << (c * kLanes);
      bits[k] = c == 0 ? mask : bits[k] | mask;
    }
  }
}

inline void GatherTerms(const void* const* rows, std::int64_t count, std::int64_t stride_bytes,
                        Element element, std::int64_t num_keys, float* to) {
  const RowSource source{nullptr, nullptr, 0, stride_bytes, element};
  TransposeStrip<Float32>(rows, count, source, num_keys, num_keys, reinterpret_cast<char*>(to));
}

inline void ScatterTerms(float* const* rows, std::int64_t count, std::int64_t stride,
                         std::int64_t num_keys, const float* from) {
  constexpr std::int64_t kPiece = 32;  // keys: 4 KB of stack
  float factor[kWidth], piece[kWidth * kPiece];
  for (float& f : factor) f = 1;
  for (std::int64_t k = 0; k < num_keys; k += kPiece) {
    // Whole groups of 4 keys are read; tiles are padded to that.
    const std::int64_t keys = num_keys - k < kPiece ? num_keys - k : kPiece;
    TransposeOut(from + k * kWidth, kWidth, factor, keys, piece, kPiece);
    for (std::int64_t n = 0; n < count; ++n) {
      float* to = rows[n] + k * stride;
      for (std::int64_t i = 0; i < keys; ++i) to[i * stride] += piece[n * kPiece + i];
    }
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace annulus
ANNULUS_POP_TARGET
