// Calls each CPU kernel once at E-CAR-S's sizes, for callgrind to count what ecar_measured() runs:
// benchmarks/instructions.py. Prints the instruction set, then the calls in their order.

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "cpu/adaln.h"
#include "cpu/flow_block.h"
#include "cpu/flow_step.h"
#include "cpu/stage_attention.h"

using std::int64_t;

extern "C" __attribute__((noinline)) void ecar_measured(const std::function<void()>& work) {
  work();
}

namespace ecar {
namespace {

constexpr int64_t kChannels = 768;
constexpr int64_t kBlock = 16;     // tokens whose gradients are summed in a row
constexpr int64_t kOutputs = 192;  // of the products, which callgrind runs slowly: four panels
constexpr const char* kNames[kDtypes] = {"float32", "bfloat16", "float16"};

// Memory that outlives its call, of 4 bytes an element: zeros are small numbers in every type,
// and no kernel branches on a value.
void* memory(int64_t elements) {
  static std::vector<std::vector<float>> all;
  all.emplace_back(elements);
  return all.back().data();
}

struct Calls {
  Dtype dtype;
  int64_t tokens;

  void measure(const char* op, const std::function<void()>& work) const {
    std::printf("%s %s %dx%d\n", op, kNames[dtype], static_cast<int>(tokens),
                static_cast<int>(kChannels));
    ecar_measured(work);
  }

  Rows rows() const { return {memory(tokens * kChannels), 0, kChannels}; }
  Rows row() const { return {memory(kChannels), 0, 0}; }

  void adaln_family() const {
    const AdalnKernels& kernels = ECAR_CHOOSE(adaln_kernels);
    AdalnForward f{};
    f.x = rows(), f.branch = rows(), f.gate = rows(), f.shift = rows(), f.scale = rows();
    f.step_gate = row(), f.step_shift = row(), f.step_scale = row();
    f.new_x = memory(tokens * kChannels), f.y = memory(tokens * kChannels);
    f.tokens = tokens, f.channels = kChannels, f.eps = 1e-6f;
    measure("adaln", [&] { kernels.adaln[dtype](f, 0, tokens); });
    measure("gated_residual", [&] { kernels.gated_residual[dtype](f, 0, tokens); });
    measure("gated_residual_adaln", [&] { kernels.gated_residual_adaln[dtype](f, 0, tokens); });

    AdalnBackward b{};
    b.grad_new_x = rows(), b.grad_y = rows(), b.x = f.x, b.branch = f.branch, b.gate = f.gate;
    b.scale = f.scale, b.step_gate = f.step_gate, b.step_scale = f.step_scale;
    b.grad_x = memory(tokens * kChannels), b.grad_branch = memory(tokens * kChannels);
    b.grad_gate = memory(tokens * kChannels), b.grad_scale = memory(tokens * kChannels);
    b.tokens = tokens, b.channels = kChannels, b.eps = 1e-6f;
    b.block = kBlock, b.blocks = tokens / kBlock;
    b.sums = static_cast<float*>(memory(b.blocks * 3 * kChannels));
    measure("adaln_backward", [&] { kernels.adaln_backward[dtype](b, 0, b.blocks); });
    measure("gated_residual_backward",
            [&] { kernels.gated_residual_backward[dtype](b, 0, b.blocks); });
    measure("gated_residual_adaln_backward",
            [&] { kernels.gated_residual_adaln_backward[dtype](b, 0, b.blocks); });
    const AdalnSums s{b.sums, memory(3 * 2 * kChannels), 1, b.blocks, 3, kChannels};
    measure("sums", [&] { kernels.sums[dtype](s, 0, 3 * kChannels); });
  }

  void flow_block() const {
    const flow_block::Kernels& kernels = ECAR_CHOOSE(flow_block_kernels);
    void* packed = memory(flow_block::packed_size(kOutputs, kChannels));
    const flow_block::Weight weight{memory(kOutputs * kChannels), kChannels, kOutputs, kChannels,
                                    packed};
    const int64_t panels = flow_block::panels(kOutputs);
    const int64_t chunks = flow_block::ceil_div(tokens, flow_block::kChunkRows);
    if (tokens == 16) measure("pack", [&] { kernels.pack[dtype](weight, 0, panels); });
    flow_block::Input in{};
    in.x = rows(), in.shift = rows(), in.scale = rows(), in.step_shift = row();
    in.step_scale = row(), in.tokens = tokens, in.depth = kChannels;
    in.eps = 1e-6f, in.scale_offset = 1;
    in.workspace = static_cast<float*>(memory(flow_block::workspace_size(tokens, kChannels)));
    flow_block::Output out{};
    out.packed = packed, out.workspace = in.workspace, out.bias = memory(kOutputs);
    out.tokens = tokens, out.outputs = kOutputs, out.depth = kChannels;
    out.y[0] = {memory(tokens * kOutputs), 0, kOutputs}, out.part = kOutputs;
    const auto run = [&] {
      kernels.prepare[dtype](in, 0, tokens, 0,
                             flow_block::ceil_div(tokens, flow_block::kBlockRows));
      kernels.multiply[dtype](out, 0, tokens, 0, panels * chunks);
    };
    out.gelu = true;
    measure("adaln_linear", run);
    out.gelu = false;
    in.scale = in.shift = in.step_scale = in.step_shift = {};
    out.gate = rows(), out.step_gate = row(), out.residual = rows();
    measure("linear_gated_residual", run);
  }

  // Two of the heads, over the keys of this stage and those before it.
  void stage_attention() const {
    constexpr int64_t heads = 2, head_dim = 128, row = heads * head_dim;
    const stage_attention::Kernels& kernels = ECAR_CHOOSE(stage_attention_kernels);
    const int64_t keys = tokens == 16 ? 16 : 336;
    std::vector<stage_attention::Block> blocks(stage_attention::blocks_of(tokens));
    stage_attention::divide(0, tokens, keys, blocks.data());
    const int64_t number = static_cast<int64_t>(blocks.size());
    const stage_attention::Shape shape{heads, tokens, keys, head_dim, blocks.data(), number, 0.1f};
    const auto view = [&](int64_t rows) {
      return stage_attention::Heads{memory(rows * row), 0, row, head_dim};
    };
    const auto output = [&](int64_t rows) {
      return stage_attention::MutableHeads{memory(rows * row), 0, row, head_dim};
    };
    float* lse = static_cast<float*>(memory(heads * tokens));
    stage_attention::Forward f{shape,      view(tokens),   view(keys),
                               view(keys), output(tokens), nullptr};
    measure("stage_attention", [&] { kernels.forward[dtype](f, 0, heads * number); });
    f.lse = lse;
    kernels.forward[dtype](f, 0, heads * number);
    const stage_attention::Backward b{
        shape, view(tokens),   f.q,          f.k,         f.v, {f.out.data, 0, row, head_dim},
        lse,   output(tokens), output(keys), output(keys)};
    measure("stage_attention_backward", [&] { kernels.backward[dtype](b, 0, heads); });
  }

  // Images of four channels whose side, in patches of two, gives the tokens.
  void flow_step() const {
    const FlowStepKernels& kernels = ECAR_CHOOSE(flow_step_kernels);
    const int64_t side = tokens == 16 ? 8 : 32, count = 4 * side * side;
    const std::int64_t seed = 7;
    EulerStep e{};
    e.x = memory(count), e.velocity = memory(count), e.unconditional = memory(count);
    e.out = memory(count), e.dt = 0.01f, e.guidance = 1.5f;
    e.sizes[0] = 1, e.sizes[1] = 4, e.sizes[2] = side, e.inner = side;
    e.x_strides[1] = e.velocity_strides[1] = side * side;
    e.x_strides[2] = e.velocity_strides[2] = side;
    UpsampleRenoise u{};
    u.step = e, u.seeds = &seed, u.stage = 2, u.up_factor = 0.5f, u.noise_factor = 0.5f;
    u.start = memory(4 * count);
    measure("upsample_renoise_euler", [&] { kernels.upsample_renoise[dtype][0](u, 0, 4 * side); });
    e.sizes[1] = e.sizes[2] = 1, e.inner = count;  // as the binding merges them
    measure("euler_step", [&] { kernels.euler_step[dtype][0](e, 0, 1); });
    InitialNoise n{&seed, 0, memory(count), count, (count + kNoiseBlock - 1) / kNoiseBlock};
    measure("initial_noise", [&] { kernels.initial_noise[dtype](n, 0, n.blocks); });
  }
};

}  // namespace
}  // namespace ecar

int main() {
  std::printf("%s\n", ecar::isa_name(ecar::isa()));
  for (int dtype = 0; dtype < ecar::kDtypes; ++dtype) {
    for (const int64_t tokens : {16, 256}) {
      const ecar::Calls calls{static_cast<ecar::Dtype>(dtype), tokens};
      calls.adaln_family();
      calls.flow_block();
      calls.stage_attention();
      calls.flow_step();
    }
  }
}
