// The reference that takes the place of a row's running maximum, in log2 units: constants that all
// kernels share. For translation units compiled for special instruction sets, as kernel_table.h.
//
// It is raised when a p exceeds 2^kGuard, and leaves kRoom for growth: p of the largest score is
// then 2^-kRoom. Both are far inside float32 and bf16. A raise multiplies what is there by
// 2^(m - new m), which is nothing below 2^-126: beyond kFar it leaves no room, so that what is
// lost, 2^kGuard at most, lies below 2^-86 of the new largest. A second raise in the same block
// starts 80 above the first reference or more: weights are lost below 2^-80 of the largest.
#pragma once

namespace annulus {

constexpr float kGuard = 40, kRoom = 40, kFar = 126 - kRoom;
// Exponents beyond this get a base: float32 keeps 2^-8 of them there, and less further out, where
// probabilities need the differences. Scores are differences once the base is subtracted.
constexpr float kFarExponent = 0x1p16F;
constexpr float kLargest = 0x1.fffffep127F;

}  // namespace annulus
