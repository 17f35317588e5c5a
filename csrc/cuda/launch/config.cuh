// The tiles of every kernel, with what limits them on an H100 or H200: 227 KB of shared memory and
// 64 Ki registers a multiprocessor; a block has one to itself.
#pragma once

#include "cuda/kernels/attention_backward_sm90.h"
#include "cuda/kernels/attention_forward_sm90.h"
#include "cuda/kernels/linear_sm90.h"
#include "cuda/kernels/mlp_sm90.h"

namespace fastattn::cuda {

// Heads are taken in sections whose keys and values (backward: queries and their gradients) fit
// here: two thirds of the 50 MB of L2.
constexpr int64_t kSectionBytes = 32 << 20;

// Keys are masked in whole blocks of this many: a kernel reads the words of whole blocks of
// kBlockK keys, and kBlockK of every attention tile below divides it.
constexpr int kKeyWordBlock = 128;

// Attention forward: head dim, keys a block, warpgroups of 64 queries, stages, key mask, groups of
// columns of 16 whose powers are polynomials, slack of a maximum.
//             shared memory   registers of a consumer
//   D = 64       120 KB            160: 3 x 64 queries; of them 128 hold o, s and p
//   D = 64       112 KB            232: with a key mask 160 do not suffice
//   D = 128      160 KB            232: more keys a block would spill
//   D = 256      192 KB            232: shared memory allows 64 keys
template <class T, int kDim, bool kKeyWords>
struct ForwardTile;
// At D = 64 a block of 64 x 128 scores takes a multiprocessor 512 cycles of products, 528 of powers
// and 470 of issued instructions; a group by polynomial makes that 496 and 505, two 464 and 542.
template <class T, int kPolynomial, int kSlack>
struct Forward64 : AttentionForward<T, 64, 128, 3, 3, false, kPolynomial, kSlack> {};
template <class T>
struct ForwardTile<T, 64, false> : Forward64<T, 0, 8> {};
template <class T>
struct ForwardTile<T, 64, true> : AttentionForward<T, 64, 128, 2, 3, true, 0, 8> {};
template <class T, bool kKeyWords>
struct ForwardTile<T, 128, kKeyWords> : AttentionForward<T, 128, 128, 2, 2, kKeyWords, 0, 8> {};
template <class T, bool kKeyWords>
struct ForwardTile<T, 256, kKeyWords> : AttentionForward<T, 256, 64, 2, 2, kKeyWords, 0, 8> {};

// Attention backward: head dim, queries a step; always 128 keys.
//   D = 64       195 KB            232: s and dp of 128 queries, 128 of them
//   D = 128      193 KB            232: dk and dv, 128 of them
template <class T, int kDim, bool kKeyWords>
struct BackwardTile;
template <class T, bool kKeyWords>
struct BackwardTile<T, 64, kKeyWords> : AttentionBackward<T, 64, 128, kKeyWords> {};
template <class T, bool kKeyWords>
struct BackwardTile<T, 128, kKeyWords> : AttentionBackward<T, 128, 64, kKeyWords> {};

// Linear: columns of a tile of 128 rows, stages.
//   256 columns  192 KB            232: 128 sums and 16 words of dY; shared memory bandwidth
//   128 columns  192 KB            232: where 256 would leave multiprocessors idle
template <class T, LinearPass kPass, int kColumns>
using LinearTile = Linear<T, kPass, kColumns, kColumns == 256 ? 4 : 6>;

// Small MLP, both directions: the widest layer, stages.
//   256 columns  184 KB            232: shared memory
//   128 columns  152 KB            232: stages hide the latency of what one block loads
template <class T, bool kForward, int kColumns>
using MlpTile = Mlp<T, kForward, kColumns, kColumns == 256 ? 3 : 5>;

// A sum is split where its tiles are fewer than half of the multiprocessors, into parts of at least
// so many steps of 64.
constexpr int64_t kLeastSteps = 4, kMostSplits = 16;

}  // namespace fastattn::cuda
