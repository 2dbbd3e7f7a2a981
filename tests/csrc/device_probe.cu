// Compiled, not run: the shared headers in a CUDA kernel.

#include "ecar/haar.h"
#include "ecar/philox.h"

__global__ void renoise(const std::int64_t* seeds, float* out) {
  const ecar::Normals4 z = ecar::image_normals(seeds[blockIdx.x], 2, threadIdx.x);
  const ecar::Block2x2 block = ecar::haar_high_pass(z.at[0], z.at[1], z.at[2]);
  out[blockIdx.x * blockDim.x + threadIdx.x] = block.at[0][0] + block.at[1][1];
}
