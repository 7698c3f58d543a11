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

constexpr std::uint32_t kPhiloxM0 = 0xD2511F53U, kPhiloxM1 = 0xCD9E8D57U;
constexpr std::uint32_t kPhiloxW0 = 0x9E3779B9U, kPhiloxW1 = 0xBB67AE85U;
constexpr int kRounds = 10;

// A word per 64-bit lane, in its lower half: products then need no shuffles. What is in the upper
// half is never looked at.
#if HWY_TARGET == HWY_SCALAR
using Words = hn::ScalableTag<std::uint64_t>;
#else
using Words = hn::Repartition<std::uint64_t, U>;
#endif
using W = hn::VFromD<Words>;
constexpr Words kWords;
constexpr int kWordLanes = HWY_LANES(std::uint64_t);

HWY_INLINE W SetWord(std::uint32_t x) { return hn::Set(kWords, std::uint64_t{x}); }
HWY_INLINE W Product(W a, W m) {
#if HWY_TARGET == HWY_SCALAR
  return W(std::uint64_t{static_cast<std::uint32_t>(a.raw)} * m.raw);
#else
  return hn::MulEven(hn::BitCast(kU, a), hn::BitCast(kU, m));
#endif
}
HWY_INLINE W High(W product) { return hn::ShiftRight<32>(product); }
// Bit n is set iff the lower word of lane n is above `last`, which may be -1.
HWY_INLINE std::uint32_t AboveBits(W words, std::int64_t last) {
  const hn::RebindToSigned<Words> d;
  const auto word = hn::BitCast(d, hn::And(words, hn::Set(kWords, 0xFFFFFFFFU)));
  std::uint8_t bytes[8] = {};
  hn::StoreMaskBits(d, hn::Gt(word, hn::Set(d, last)), bytes);
  return bytes[0] & ((1U << kWordLanes) - 1);
}

// Keys of the rounds.
struct PhiloxKey {
  std::uint32_t k0[kRounds], k1[kRounds];
  explicit PhiloxKey(std::uint64_t seed) {
    k0[0] = static_cast<std::uint32_t>(seed), k1[0] = static_cast<std::uint32_t>(seed >> 32);
    for (int i = 1; i < kRounds; ++i) k0[i] = k0[i - 1] + kPhiloxW0, k1[i] = k1[i - 1] + kPhiloxW1;
  }
};

// What depends on the lane alone: counter words are batch, head, query, key, so after round 2 words
// 2 and 3 know no key, and after round 3 word 1 and half of word 0.
struct PhiloxLanes {
  W one;          // after round 1, word 1
  W three;        // after round 2, word 3
  W high2, low2;  // round 3's product of word 2
  PhiloxLanes() = default;
  PhiloxLanes(const std::uint64_t* zero, const std::uint64_t* first, std::uint32_t batch_low,
              const PhiloxKey& key)
      : one(hn::Load(kWords, first)) {
    const W product = Product(hn::Load(kWords, zero), SetWord(kPhiloxM0));
    three = product;
    const W two = hn::Xor(High(product), SetWord(batch_low ^ key.k1[1]));
    low2 = Product(two, SetWord(kPhiloxM1)), high2 = High(low2);
  }
};

// Vectors of lanes computed side by side: one alone is a chain of 60 cycles, and a core's
// schedulers hold two or three of them (forward at d = 64: 0.44 of the speed without dropout, side
// by side 0.51). More do not fit the registers.
constexpr int kVectors = kWidth / kWordLanes, kMostChains = HWY_TARGET <= HWY_AVX3 ? 4 : 2;
constexpr int kChains = kVectors < kMostChains ? kVectors : kMostChains;
static_assert(kVectors % kChains == 0);

// The first words of the blocks of one key and some lanes; `key_high`, `key_low`: round 2's product
// of word 2, which knows no lane.
HWY_INLINE void FirstWords(const PhiloxLanes* lanes, std::uint32_t key_high, std::uint32_t key_low,
                           const PhiloxKey& key, W (&words)[kChains]) {
  const W m0 = SetWord(kPhiloxM0), m1 = SetWord(kPhiloxM1);
  const W high = SetWord(key_high ^ key.k0[1]), low = SetWord(key_low ^ key.k0[2]);
  W x0[kChains], x1[kChains], x2[kChains], x3[kChains];
  ANNULUS_UNROLL for (int c = 0; c < kChains; ++c) {
    const W product0 = Product(hn::Xor(lanes[c].one, high), m0);
    x0[c] = hn::Xor(lanes[c].high2, low), x1[c] = lanes[c].low2;
    x2[c] = hn::Xor3(High(product0), lanes[c].three, SetWord(key.k1[2])), x3[c] = product0;
  }
  ANNULUS_UNROLL for (int i = 3; i < kRounds - 1; ++i) {
    const W k0 = SetWord(key.k0[i]), k1 = SetWord(key.k1[i]);
    ANNULUS_UNROLL for (int c = 0; c < kChains; ++c) {
      const W product0 = Product(x0[c], m0), product1 = Product(x2[c], m1);
      x0[c] = hn::Xor3(High(product1), x1[c], k0), x1[c] = product1;
      x2[c] = hn::Xor3(High(product0), x3[c], k1), x3[c] = product0;
    }
  }
  const W k0 = SetWord(key.k0[kRounds - 1]);
  ANNULUS_UNROLL for (int c = 0; c < kChains; ++c) {
    words[c] = hn::Xor3(High(Product(x2[c], m1)), x1[c], k0);
  }
}

inline void KeepBits(const DropoutRows& rows, const std::int64_t* keys, std::int64_t num_keys,
                     std::uint32_t* bits) {
  const PhiloxKey key(rows.seed);
  const std::uint64_t batch = std::uint64_t{kPhiloxM0} * rows.batch;
  // Round 1 of words 0 and 1: of the lanes' queries and heads.
  alignas(64) std::uint64_t zero[kWidth] = {}, one[kWidth] = {};
  for (std::int64_t n = 0; n < rows.count; ++n) {
    const std::uint64_t product =
        std::uint64_t{kPhiloxM1} * static_cast<std::uint32_t>(rows.query[n]);
    zero[n] = (product >> 32) ^ static_cast<std::uint32_t>(rows.head[n]) ^ key.k0[0];
    one[n] = product;
  }
  const std::int64_t last = static_cast<std::int64_t>(rows.threshold) - 1;
  for (std::int64_t n = 0; n < kWidth; n += kChains * kWordLanes) {
    PhiloxLanes lanes[kChains];
    for (int c = 0; c < kChains; ++c) {
      const std::int64_t at = n + c * kWordLanes;
      lanes[c] = PhiloxLanes(zero + at, one + at, static_cast<std::uint32_t>(batch), key);
    }
    for (std::int64_t k = 0; k < num_keys; ++k) {
      const std::uint32_t word =
          static_cast<std::uint32_t>(batch >> 32) ^ static_cast<std::uint32_t>(keys[k]) ^ key.k1[0];
      const std::uint64_t product = std::uint64_t{kPhiloxM1} * word;
      W words[kChains];
      FirstWords(lanes, static_cast<std::uint32_t>(product >> 32),
                 static_cast<std::uint32_t>(product), key, words);
      std::uint32_t kept = n == 0 ? 0 : bits[k];
      ANNULUS_UNROLL for (int c = 0; c < kChains; ++c) {
        kept |= AboveBits(words[c], last) << (n + c * kWordLanes);
      }
      bits[k] = kept;
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
