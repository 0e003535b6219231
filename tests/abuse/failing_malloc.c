// failing_malloc.c: preloaded into a process, fails the allocation that the test asks for.
//
//   The file named by ARGOSY_FAIL_AT holds two int64 that the test maps as well:
//     [0]  allocations of at least 4 KiB until one fails, counted down; 0 or less: none fails
//     [1]  allocations of at least 4 KiB so far
//
// glibc only: its own functions are called by their internal names, because dlsym allocates.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

static _Atomic int64_t* told;

__attribute__((constructor)) static void map_file(void) {
  const char* path = getenv("ARGOSY_FAIL_AT");
  const int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
  if (file < 0) return;
  const long mapped = syscall(SYS_mmap, NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (mapped > 0) told = (_Atomic int64_t*)mapped;
  close(file);
}

static int fails(size_t nbytes) {
  if (!told || nbytes < 4096) return 0;
  atomic_fetch_add(&told[1], 1);
  if (atomic_load(&told[0]) <= 0 || atomic_fetch_sub(&told[0], 1) != 1) return 0;
  errno = ENOMEM;
  return 1;
}

void* malloc(size_t nbytes) { return fails(nbytes) ? NULL : __libc_malloc(nbytes); }

void* calloc(size_t count, size_t nbytes) {
  size_t total;
  return !__builtin_mul_overflow(count, nbytes, &total) && fails(total) ? NULL : __libc_calloc(count, nbytes);
}

void* realloc(void* old, size_t nbytes) { return fails(nbytes) ? NULL : __libc_realloc(old, nbytes); }

void* aligned_alloc(size_t alignment, size_t nbytes) {
  return fails(nbytes) ? NULL : __libc_memalign(alignment, nbytes);
}

void* memalign(size_t alignment, size_t nbytes) { return aligned_alloc(alignment, nbytes); }

int posix_memalign(void** found, size_t alignment, size_t nbytes) {
  void* const block = aligned_alloc(alignment, nbytes);
  if (!block) return ENOMEM;
  *found = block;
  return 0;
}

void* mmap(void* where, size_t nbytes, int protection, int flags, int file, off_t offset) {
  if (flags & MAP_ANONYMOUS && fails(nbytes)) return MAP_FAILED;
  return (void*)syscall(SYS_mmap, where, nbytes, protection, flags, file, offset);
}
