// Holds most of a GPU's memory until its input ends:
//
//   gpu_hog DEVICE MIB_TO_LEAVE     says "holding ..." once it has it
//   gpu_hog count                   says how many GPUs there are
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

int main(int argc, char** argv) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
  if (argc == 2 && std::strcmp(argv[1], "count") == 0) {
    std::printf("%d\n", count);
    return 0;
  }
  if (argc != 3 || cudaSetDevice(std::atoi(argv[1])) != cudaSuccess) {
    std::fprintf(stderr, "usage: gpu_hog DEVICE MIB_TO_LEAVE, or gpu_hog count\n");
    return 2;
  }
  const size_t leave = std::strtoull(argv[2], nullptr, 10) << 20;
  size_t available = 0, total = 0;
  // Smaller and smaller pieces: memory comes in blocks, and not all that is free can be had.
  for (size_t piece = size_t{8} << 30; piece >= size_t{2} << 20; piece /= 2) {
    while (cudaMemGetInfo(&available, &total) == cudaSuccess && available >= leave + piece) {
      void* memory = nullptr;
      if (cudaMalloc(&memory, piece) != cudaSuccess) {
        cudaGetLastError();
        break;
      }
    }
  }
  std::printf("holding all but %zu of %zu MiB\n", available >> 20, total >> 20);
  std::fflush(stdout);
  while (std::getchar() != EOF) {
  }
  return 0;
}
