#include "cluster/stream_socket.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>

#include "cluster/frame.h"

namespace argosy {
namespace {

// A machine that has gone is noticed after about 5 + 3 * 2 seconds if nothing is on its way. Otherwise after
// a minute: an end that is busy with a long prompt may leave bytes in its socket for many seconds.
constexpr int kIdleSeconds = 5, kProbeSeconds = 2, kNumProbes = 3, kUnsentMs = 60'000;

int option(int fd, int level, int name) {
  int value = 0;
  socklen_t size = sizeof(value);
  if (getsockopt(fd, level, name, &value, &size) != 0) return -1;
  return value;
}

void set(int fd, int level, int name, int value) {
  if (setsockopt(fd, level, name, &value, sizeof(value)) != 0) {
    throw std::invalid_argument(std::string("the socket refuses an option: ") + strerror(errno));
  }
}

bool must_wait(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

}  // namespace

StreamSocket::StreamSocket(int fd) : fd_(fd) {
  if (option(fd, SOL_SOCKET, SO_TYPE) != SOCK_STREAM) {
    throw std::invalid_argument("descriptor " + std::to_string(fd) + " is not a stream socket");
  }
  const int family = option(fd, SOL_SOCKET, SO_DOMAIN);
  if (family != AF_INET && family != AF_INET6) return;
  set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  set(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  set(fd, IPPROTO_TCP, TCP_KEEPIDLE, kIdleSeconds);
  set(fd, IPPROTO_TCP, TCP_KEEPINTVL, kProbeSeconds);
  set(fd, IPPROTO_TCP, TCP_KEEPCNT, kNumProbes);
  set(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, kUnsentMs);
}

StreamSocket::~StreamSocket() { ::close(fd_); }

int64_t StreamSocket::send(Parts& parts) {
  msghdr message = {};
  message.msg_iov = parts.span().data();
  message.msg_iovlen = parts.span().size();
  const ssize_t sent = sendmsg(fd_, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
  if (sent >= 0) return sent;
  if (must_wait(errno)) return 0;
  throw LinkError(LinkFailure::ended, std::string("the connection was lost: ") + strerror(errno));
}

int64_t StreamSocket::receive(Parts& parts) {
  msghdr message = {};
  message.msg_iov = parts.span().data();
  message.msg_iovlen = parts.span().size();
  const ssize_t received = recvmsg(fd_, &message, MSG_DONTWAIT);
  if (received > 0) return received;
  if (received == 0) throw LinkError(LinkFailure::ended, "the other end closed the connection");
  if (must_wait(errno)) return 0;
  throw LinkError(LinkFailure::ended, std::string("the connection was lost: ") + strerror(errno));
}

void StreamSocket::shutdown() { ::shutdown(fd_, SHUT_RDWR); }

WakeUp::WakeUp() : fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
}

WakeUp::~WakeUp() { ::close(fd_); }

void WakeUp::ring() { eventfd_write(fd_, 1); }

void WakeUp::clear() {
  eventfd_t value;
  eventfd_read(fd_, &value);
}

}  // namespace argosy
