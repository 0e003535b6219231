// kernel_table.h: every kernel as a function pointer, one table per instruction set, chosen at run time.
//
//   kernel_table("avx2")  ->  the KernelTable of that instruction set; best_kernels(): of the fastest here
//
// A Runtime (ops/runtime.h) holds the table that its operations use, from its construction to its end.
//
// A kernel works on a range (rows of a matrix, tokens of a batch) and allocates nothing; native/ops
// distributes the ranges over threads. Promise: for one row and one token, the floating-point operations and
// their order do not depend on the range, the number of tokens in the call or the alignment of the weights.
// The order differs between instruction sets.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/formats.h"
#include "kernels/transcode.h"

namespace argosy {

// Each operation declares its arguments in its own header, or in one next to it (matmul_args.h).
struct MatmulArgs;
struct SplitArgs;
struct RouteArgs;
struct ActivateArgs;
struct LowRankArgs;
struct AttendArgs;
struct PanelArgs;
struct LinearArgs;
struct RoundKeysArgs;
struct AttendRoundedArgs;
struct KvWriteArgs;
struct LatentWriteArgs;
struct AttentionArgs;
struct LatentAttentionArgs;
struct IndexArgs;
struct CausalConvArgs;
struct PoolArgs;
struct DeltaGatesArgs;
struct ChannelGatesArgs;
struct DeltaRuleArgs;
struct MambaStepsArgs;
enum class GateKind;
enum class Gelu;

struct KernelTable {
  const char* name;

  void (*matmul[kNumFormats])(const MatmulArgs& args);
  int64_t product_scratch_bytes;  // of a thread
  bool has_tiles;                 // whether some products run on the tiles of AMX
  // x begins at column 32 * group_begin; `activations` is the token's whole row of `cols`.
  void (*quantize_activations)(const float* x, int64_t cols, int64_t group_begin, int64_t group_end,
                               uint8_t* activations);

  // For products whose format splits_activations(); nullptr: there are none.
  void (*split_activations)(const SplitArgs& args);

  // Converts weights in and out. Panels [panel_begin, panel_end) of q8 or q4; `out` is the whole matrix.
  void (*quantize_q8)(const float* weights, int64_t rows, int64_t cols, int64_t panel_begin,
                      int64_t panel_end, uint8_t* out);
  void (*quantize_q4)(const float* weights, int64_t rows, int64_t cols, int64_t panel_begin,
                      int64_t panel_end, uint8_t* out);
  bool (*transcode[kNumBlockTypes])(const TranscodeArgs& args);
  bool (*transcode_grouped)(const TranscodeArgs& args);
  void (*move_columns)(const ActOrderArgs& args);
  void (*dequantize_row)(Format format, const uint8_t* weights, int64_t cols, int64_t row, float* out);

  // out may be x.
  void (*rms_norm)(const float* x, const float* weight, int64_t cols, float eps, float* out);
  // x [num_heads][head_dim]; cosine and sine [num_pairs]. Dimension i rotates with dimension i + num_pairs,
  // or, if pairs are interleaved, dimension 2 i with 2 i + 1.
  void (*rope)(float* x, int64_t num_heads, int64_t head_dim, const float* cosine, const float* sine,
               int64_t num_pairs, bool is_interleaved);
  void (*route)(const RouteArgs& args);
  void (*activate)(const ActivateArgs& args);
  void (*add_low_rank)(const LowRankArgs& args);
  void (*combine)(const float* expert_out, const float* weights, int64_t k, int64_t hidden, float* out);
  void (*add_sigmoid_gated)(const float* x, float gate_logit, int64_t hidden, float* out);

  // x *= the activation of the gate: each element's own, gate_step floats apart (1), or the same for all (0).
  void (*mul_gate)(GateKind kind, const float* gate, int64_t gate_step, int64_t n, float* x);
  void (*soft_cap)(float cap, int64_t n, float* x);  // x = cap * tanh(x / cap)

  // For encoders. out may be x; bias may be nullptr.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int64_t cols, float eps,
                     float* out);
  void (*gelu)(Gelu kind, int64_t n, float* x);
  void (*silu)(int64_t n, float* x);
  void (*attend)(const AttendArgs& args);
  // All are nullptr if the CPU has no product of bfloat16.
  void (*round_to_panel)(const PanelArgs& args);
  void (*linear_panel)(const LinearArgs& args);
  void (*round_keys)(const RoundKeysArgs& args);
  void (*attend_rounded)(const AttendRoundedArgs& args);

  void (*kv_write)(const KvWriteArgs& args);
  void (*latent_write)(const LatentWriteArgs& args);
  void (*attention)(const AttentionArgs& args);
  int64_t most_queries;  // (token, head) pairs that a call processes at once
  int64_t (*attention_floats)(int64_t head_dim, int64_t value_dim);  // the scratch of a call
  // Merges the state of a query's next section into `state`.
  void (*attention_merge)(const float* next, int64_t value_dim, float* state);
  void (*attention_finish)(const float* state, int64_t value_dim, float* out);  // [value_dim]

  void (*causal_conv)(const CausalConvArgs& args);
  void (*pool)(const PoolArgs& args);
  void (*delta_gates)(const DeltaGatesArgs& args);
  void (*channel_gates)(const ChannelGatesArgs& args);
  void (*delta_rule)(const DeltaRuleArgs& args);
  void (*mamba_steps)(const MambaStepsArgs& args);

  void (*latent_attention)(const LatentAttentionArgs& args);
  int64_t most_columns;                                      // in a call
  int64_t (*latent_floats)(int64_t dim, int64_t value_dim);  // the scratch of a call
  // Merges the state of a column's next section into `state`.
  void (*latent_merge)(const float* next, int64_t value_dim, int64_t num_heads, float* state);
  void (*latent_finish)(const float* state, int64_t value_dim, int64_t num_heads, const float* sinks,
                        float* out);
  void (*index_scores)(const IndexArgs& args);

  // For ops/machine_probe.h. Both return a number that depends on all their work.
  uint64_t (*read_memory)(const uint8_t* data, int64_t nbytes);  // aligned to 64; nbytes is a multiple of 512
  uint64_t (*multiply_int8)(int64_t rounds);                     // int8_products_per_round each
  int64_t int8_products_per_round;
};

// "plain", "avx2", "amx", "avx512": the sets that this CPU and its operating system can run, the best one
// last. "amx" comes before "avx512" until it has been measured on a processor that has it.
std::vector<std::string> instruction_sets();

// Throws std::invalid_argument for a name that is not in instruction_sets().
const KernelTable& kernel_table(const std::string& name);
// The table of the last of instruction_sets().
const KernelTable& best_kernels();

// The largest KernelTable::attention_floats and most_queries of all instruction sets here.
int64_t most_attention_floats(int64_t head_dim, int64_t value_dim);
int64_t most_attention_queries();
// The largest KernelTable::latent_floats and most_columns.
int64_t most_latent_floats(int64_t dim, int64_t value_dim);
int64_t most_latent_columns();

// "absent": the CPU has no AMX, or not what the kernels need of it; "refused": the system lets this process
// use no tiles; "usable".
const char* amx_state();

}  // namespace argosy
