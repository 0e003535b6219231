// module.cpp: argosy._native, the only binding between Python and C++.

#include "bind/bind.h"

#if !__has_include(<sys/single_threaded.h>)
// A libstdc++ that was compiled for glibc 2.32 or later asks glibc whether the process has one thread. A
// module that is linked against an older glibc answers itself: perhaps not.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;
#endif

NB_MODULE(_native, m) {
  m.doc() = R"(
    The native module: arithmetic, threads and bytes.

    Arrays are C-contiguous; where rows may be strided, only each row is. Float arrays are float32 and integer arrays
    int32 unless their type says otherwise. A wrong size, dtype, range or name raises ValueError with the found and the
    expected value. Every operation releases the GIL. One `Runtime` runs one operation at a time.

    For one row and one token, the floating-point operations of a kernel (native/kernels, native/ops) and their order do
    not depend on the rest of the call, the number of threads or the alignment of the weights. One exception is documented
    at `linear`.

    Probes (native/ops/machine_probe.h) measure how fast this machine is right now: the best of several passes. They run
    the kernels of `instruction_set`, or of the best one.

    Constants:
        LARGEST_SIZE: most rows and most columns of a matrix.
        MATRIX_ALIGNMENT: bytes; where a transcoded matrix begins in an arena, and a matrix in a pack's record.
        PANEL_ROWS: rows of a quantised matrix that are interleaved.
        F8_BLOCK: rows and columns of a block of an f8 matrix, whose weights share a scale.
        STAGING_BYTES: most bytes that one reader of a `Store` holds for transcoding.)";
  argosy::bind_store(m);
  argosy::bind_kernels(m);
  argosy::bind_encoder(m);
  argosy::bind_expert_table(m);
  argosy::bind_cached_experts(m);
  argosy::bind_cluster(m);
  argosy::bind_recurrent(m);
  argosy::bind_mixers(m);
  argosy::bind_residual(m);
  argosy::bind_tables(m);
  argosy::bind_stack_adapter(m);
  argosy::bind_stack(m);
  argosy::bind_probe(m);
  argosy::bind_replay(m);
  argosy::bind_watermark(m);
}
