// module.cpp: argosy._native, the only binding between Python and C++.

#include "bind/bind.h"

NB_MODULE(_native, m) {
  m.doc() = "Arithmetic, threads and bytes of Argosy. Shapes and errors: _native.pyi.";
  argosy::bind_store(m);
  argosy::bind_kernels(m);
  argosy::bind_expert_table(m);
  argosy::bind_recurrent(m);
  argosy::bind_stack(m);
  argosy::bind_probe(m);
}
