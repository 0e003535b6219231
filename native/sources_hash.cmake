# Writes a header with the hash of all sources that decide the bits of a sum: kernels, the threads that run them, the
# store that lands weights, and the flags of this build. Machines of a group compare it (src/argosy/cluster/hello.py).
#
#   cmake -DROOT=... -DOUT=... -P sources_hash.cmake
file(GLOB sources LIST_DIRECTORIES false RELATIVE ${ROOT}
     ${ROOT}/native/kernels/* ${ROOT}/native/store/* ${ROOT}/native/ops/*)
list(APPEND sources CMakeLists.txt)
list(SORT sources)
set(lines "")
foreach(source ${sources})
  file(SHA256 ${ROOT}/${source} hash)
  string(APPEND lines "${source} ${hash}\n")
endforeach()
string(SHA256 hash "${lines}")
file(WRITE ${OUT} "#pragma once\ninline constexpr char kSourcesHash[] = \"${hash}\";\n")
