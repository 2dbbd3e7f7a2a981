#include "cpu/pages.h"

#if defined(__linux__)
#include <cstdint>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace ecar {

#if defined(__linux__)

namespace {

constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1; older headers lack the name

// Only advice, so a refusal is no error; whole pages, lest memory of others be moved.
void advise(void* data, std::size_t bytes, int advice) {
  madvise(data, bytes / kLargePage * kLargePage, advice);
}

}  // namespace

void ask_for_large_pages(void* data, std::size_t bytes) { advise(data, bytes, MADV_HUGEPAGE); }
void move_to_large_pages(void* data, std::size_t bytes) { advise(data, bytes, kCollapse); }

void give_back_pages(void* data, std::size_t bytes) {
  const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (at + page - 1) / page * page, last = (at + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

#else

void ask_for_large_pages(void*, std::size_t) {}
void move_to_large_pages(void*, std::size_t) {}
void give_back_pages(void*, std::size_t) {}

#endif

}  // namespace ecar
