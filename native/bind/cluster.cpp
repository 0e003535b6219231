// cluster.cpp: binds both ends of the connections between a coordinator and its workers.

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/experts.h"
#include "cluster/exchange.h"
#include "cluster/group_experts.h"
#include "cluster/owners.h"
#include "cluster/worker_link.h"
#include "sources_hash.h"

namespace argosy {

using namespace nb::literals;

namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

// Python checks for ^C this often while it waits.
constexpr milliseconds kSignalInterval{100};
constexpr int64_t kMostWaitMs = 86'400'000;  // a day

using Shares = std::map<int64_t, std::vector<int32_t>>;
using FailureName = Named<std::string, "typing.Literal['ended', 'refused', 'protocol', 'silent', 'full']">;

const char* name_of(LinkFailure failure) {
  switch (failure) {
    case LinkFailure::ended:
      return "ended";
    case LinkFailure::refused:
      return "refused";
    case LinkFailure::protocol:
      return "protocol";
    case LinkFailure::silent:
      return "silent";
    case LinkFailure::full:
      return "full";
  }
  return "";
}

LinkLimits parse_limits(int64_t hidden, std::vector<int32_t> num_experts, int64_t most_rows,
                        int64_t most_assignments) {
  return {hidden, std::move(num_experts), most_rows, most_assignments};
}

// An exchange that keeps the arrays of its tickets alive. It is always called without the GIL: it may let go
// of a dispatch while it holds its lock, which takes the GIL.
class BoundExchange {
 public:
  explicit BoundExchange(LinkLimits limits) : exchange_(std::move(limits)) {}

  Exchange& exchange() { return exchange_; }

  int64_t send(int64_t layer, std::shared_ptr<Dispatch> dispatch, const ArrayOf<float>& rows,
               const OutArrayOf<float>& out, const Shares& shares) {
    require_item("dispatch", dispatch.get());
    const int64_t hidden = exchange_.limits().hidden;
    const float* from = read_array("rows", rows, {dispatch->num_tokens(), hidden});
    float* to = write_array("out", out, {dispatch->num_assignments(), hidden});
    int64_t ticket;
    {
      const std::vector<Share> listed = listed_shares(shares);
      nb::gil_scoped_release released;
      ticket = exchange_.send(layer, std::move(dispatch), from, to, listed);
    }
    arrays_.emplace(ticket, std::pair(rows, out));
    return ticket;
  }

  void resend(int64_t ticket, const Shares& shares) {
    const std::vector<Share> listed = listed_shares(shares);
    nb::gil_scoped_release released;
    exchange_.resend(ticket, listed);
  }

  std::vector<ExchangeEvent> receive(int64_t ticket, int64_t timeout_us) {
    require_range("timeout_us", timeout_us, 0, kMostWaitMs * 1000);
    for (microseconds left(timeout_us);;) {
      const microseconds now = std::min<microseconds>(left, kSignalInterval);
      std::vector<ExchangeEvent> events;
      bool is_waiting;
      {
        nb::gil_scoped_release released;
        events = exchange_.receive(ticket, now);
        is_waiting = events.empty() && exchange_.is_outstanding(ticket);
      }
      left -= now;
      if (!is_waiting || left.count() == 0) return events;
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
    }
  }

  void drop(int64_t ticket, const std::vector<int32_t>& experts) {
    nb::gil_scoped_release released;
    exchange_.drop(ticket, experts);
  }

  void forget(int64_t ticket) {
    {
      nb::gil_scoped_release released;
      exchange_.forget(ticket);
    }
    arrays_.erase(ticket);
  }

 private:
  static std::vector<Share> listed_shares(const Shares& shares) {
    std::vector<Share> listed;
    for (const auto& [peer, experts] : shares) listed.push_back({peer, experts});
    return listed;
  }

  Exchange exchange_;
  std::map<int64_t, std::pair<ArrayOf<float>, OutArrayOf<float>>> arrays_;
};

void inject(BoundExchange& bound, int64_t peer, int64_t delay_us, std::optional<int64_t> bytes_per_s,
            std::optional<int64_t> bytes_to_live, bool is_stalled) {
  require_range("delay_us", delay_us, 0, kMostWaitMs * 1000);
  if (bytes_per_s) require_range("bytes_per_s", *bytes_per_s, 1, int64_t{1} << 50);
  if (bytes_to_live) require_range("bytes_to_live", *bytes_to_live, 0, int64_t{1} << 62);
  nb::gil_scoped_release released;
  bound.exchange().inject(peer, {microseconds(delay_us), bytes_per_s, bytes_to_live, is_stalled});
}

// A link that only one thread serves at a time.
class BoundWorkerLink {
 public:
  BoundWorkerLink(int fd, LinkLimits limits) : link_(fd, std::move(limits)) {}

  WorkerLink& link() { return link_; }

  // Calls `body` without the GIL, unless another thread serves the link.
  template <class Body>
  auto serve(Body&& body) {
    struct Turn {
      std::atomic<bool>& is_served;
      ~Turn() { is_served = false; }
    };
    if (is_served_.exchange(true)) refuse("another thread serves this link");
    const Turn turn{is_served_};
    nb::gil_scoped_release released;
    return body(link_);
  }

 private:
  WorkerLink link_;
  std::atomic<bool> is_served_ = false;
};

struct WorkerRequest {
  nb::object owner;  // keeps the arrays of rows and outputs alive
  float *rows, *out;
  int64_t layer, hidden;
  std::shared_ptr<Dispatch> dispatch;
};

struct WorkerGuess {
  WorkerLink::Guess guess;
};

using NextOfLink =
    nb::typed<nb::object, TypeName<"WorkerRequest | WorkerGuess | Literal['interrupted', 'idle'] | None">>;

NextOfLink next(nb::pointer_and_handle<BoundWorkerLink> self, std::optional<int64_t> most_ms) {
  if (most_ms) require_range("most_ms", *most_ms, 0, kMostWaitMs);
  for (milliseconds left(most_ms.value_or(0));;) {
    const milliseconds now = most_ms ? std::min(left, kSignalInterval) : kSignalInterval;
    const WorkerLink::Next found = self.p->serve([&](WorkerLink& link) { return link.next(now); });
    WorkerLink& link = self.p->link();
    switch (found) {
      case WorkerLink::Next::request:
        return nb::cast(WorkerRequest{nb::borrow(self.h), link.rows(), link.out(), link.layer(),
                                      link.limits().hidden, link.dispatch()});
      case WorkerLink::Next::guess:
        return nb::cast(WorkerGuess{link.guess()});
      case WorkerLink::Next::ended:
        return nb::none();
      case WorkerLink::Next::interrupted:
        return nb::cast("interrupted");
      case WorkerLink::Next::idle:
        break;
    }
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
    left -= now;
    if (most_ms && left.count() == 0) return nb::cast("idle");
  }
}

bool serve_resident(BoundWorkerLink& bound, Runtime& runtime, BoundExpertTable& table) {
  while (true) {
    const WorkerLink::Next found =
        bound.serve([&](WorkerLink& link) { return link.serve_resident(runtime, table, kSignalInterval); });
    if (found != WorkerLink::Next::idle) return found != WorkerLink::Next::ended;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }
}

View<const float> rows_of(const WorkerRequest& request) {
  return View<const float>(request.rows, {size_t(request.dispatch->num_tokens()), size_t(request.hidden)},
                           request.owner);
}

View<float> out_of(const WorkerRequest& request) {
  return View<float>(request.out, {size_t(request.dispatch->num_assignments()), size_t(request.hidden)},
                     request.owner);
}

// A group's owners live in shared_ptrs that hold no Python object, so any thread may let them go.
std::shared_ptr<Owners> make_owners(std::vector<std::shared_ptr<Owner>> hosts, const ArrayOf<int16_t>& table,
                                    std::shared_ptr<Owner> here) {
  const int16_t* from = read_array("table", table, {kAnySize, kAnySize, kAnySize});
  for (size_t i = 0; i < hosts.size(); ++i) require_item(item_name("hosts", i), hosts[i].get());
  const auto size = [&table](size_t axis) { return int64_t(table.shape(axis)); };
  require_range("experts in the table", size(0) * size(1) * size(2), 0, INT32_MAX);
  return std::make_shared<Owners>(std::move(hosts), std::move(here), size(0), size(1), size(2),
                                  std::vector<int16_t>(from, from + table.size()));
}

using OwnerAndExperts = std::tuple<std::shared_ptr<Owner>, std::vector<int32_t>>;
using OwedShare = std::tuple<std::shared_ptr<Owner>, int64_t, std::vector<int32_t>, double>;

std::vector<OwnerAndExperts> choose(const Owners& owners, int64_t layer,
                                    const std::vector<int32_t>& experts) {
  std::vector<OwnerAndExperts> shares;
  for (OwnerShare& share : owners.choose(layer, experts)) {
    shares.emplace_back(std::move(share.owner), std::move(share.experts));
  }
  return shares;
}

std::vector<std::shared_ptr<Owner>> candidates(const Owners& owners, int64_t layer, int64_t expert,
                                               const std::vector<const Owner*>& tried) {
  return owners.candidates(layer, expert, tried);
}

// The experts of a group, with the Python objects that they use.
class BoundGroupExperts : public GroupExperts {
 public:
  BoundGroupExperts(BoundExchange& exchange) : GroupExperts(exchange.exchange()) {}

  void use(std::shared_ptr<Owners> owners, const nb::typed<nb::object, BoundExpertTable>& table) {
    require_item("owners", owners.get());
    BoundExpertTable* experts = table.is_none() ? nullptr : nb::cast<BoundExpertTable*>(table);
    if (experts != nullptr) require_size("columns of the experts", experts->hidden(), hidden());
    GroupExperts::use(std::move(owners), experts);
    table_ = table;
  }

 private:
  nb::object table_;
};

double seconds_of(std::chrono::steady_clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

std::vector<OwedShare> shares_of(const GroupExperts::Begun& begun) {
  std::vector<OwedShare> shares;
  for (const GroupExperts::Begun::Share& share : begun.shares) {
    shares.emplace_back(share.owner, share.peer, share.experts,
                        seconds_of(share.deadline.time_since_epoch()));
  }
  return shares;
}

// An atomic number of an owner as an attribute.
template <auto member>
auto get_number(const Owner& owner) {
  return (owner.*member).load();
}
template <auto member, class T>
void set_number(Owner& owner, T value) {
  (owner.*member).store(value);
}

void bind_owners(nb::module_& m) {
  nb::class_<Owner>(m, "Owner", R"(
    A host that can run experts: a worker, or this machine. Any thread may read and change it.

    Attributes:
        peer: its connection; None: there is none, or it is this machine.
        is_slow: it was late and still owes an answer.
        is_set_aside: its results differed from those of others.
        is_resident: it holds every expert in memory.
        num_run, num_rerouted, num_verified, num_mismatches: counts of experts, once per layer and step: those that it
            ran, that went to another owner after it, that another owner also computed, and whose bits then differed.)")
      .def(nb::new_([](std::string name) { return std::make_shared<Owner>(std::move(name)); }), "name"_a)
      .def_prop_ro("name", &Owner::name)
      .def_prop_rw(
          "peer",
          [](const Owner& owner) -> std::optional<int64_t> {
            const int64_t peer = owner.peer;
            return peer == 0 ? std::nullopt : std::optional(peer);
          },
          [](Owner& owner, std::optional<int64_t> peer) { owner.peer = peer.value_or(0); },
          nb::for_setter("peer"_a.none()))
      .def_prop_rw("is_slow", &get_number<&Owner::is_slow>, &set_number<&Owner::is_slow, bool>)
      .def_prop_rw("is_set_aside", &get_number<&Owner::is_set_aside>, &set_number<&Owner::is_set_aside, bool>)
      .def_prop_rw("is_resident", &get_number<&Owner::is_resident>, &set_number<&Owner::is_resident, bool>)
      .def_prop_rw("num_run", &get_number<&Owner::num_run>, &set_number<&Owner::num_run, int64_t>)
      .def_prop_rw("num_rerouted", &get_number<&Owner::num_rerouted>,
                   &set_number<&Owner::num_rerouted, int64_t>)
      .def_prop_rw("num_verified", &get_number<&Owner::num_verified>,
                   &set_number<&Owner::num_verified, int64_t>)
      .def_prop_rw("num_mismatches", &get_number<&Owner::num_mismatches>,
                   &set_number<&Owner::num_mismatches, int64_t>)
      .def("set_rates", &Owner::set_rates, "record_bytes"_a, "disk_bytes_per_s"_a,
           "Estimate the seconds that an expert of this size takes here; 0 for the drive: unknown.")
      .def_prop_ro("hit_s", &Owner::hit_s, "Seconds to run an expert in memory.")
      .def_prop_ro("miss_s", &Owner::miss_s, "Seconds to read and run an expert.")
      .def("remember", &Owner::remember, "num_slots"_a, nb::kw_only(), "num_layers"_a, "num_experts"_a, R"(
        From now on remember the last `num_slots` experts that it ran, and no earlier one.

        Takes 8 bytes for each expert of the model.)")
      .def("forget", &Owner::forget, "Forget its experts: it may have been restarted.")
      .def("note", &Owner::note, "layer"_a, "experts"_a, "It has run these experts.")
      .def("has", &Owner::has, "layer"_a, "expert"_a, "Whether it probably has an expert in memory.")
      .def_prop_ro("num_remembered", &Owner::num_remembered);

  nb::class_<Owners>(m, "Owners", R"(
    The owners of every expert of a model. It never changes: a new plan is another table.

    Args:
        hosts: workers, and this machine if it runs experts.
        table: int16 [layers, experts, replicas], indices of `hosts`, the first owner before the second; -1: none.
        here: this machine, one of `hosts`; None: it runs no experts.)")
      .def(nb::new_(&make_owners), "hosts"_a, "table"_a, "here"_a.none() = nb::none())
      .def_prop_ro("hosts", &Owners::hosts)
      .def_prop_ro("here", &Owners::here)
      .def("owners_of", &Owners::owners_of, "layer"_a, "expert"_a)
      .def("candidates", &candidates, "layer"_a, "expert"_a, "tried"_a, R"(
        The hosts that can be asked for an expert now, besides those that were tried.

        They are the owners that are expected to answer in time; without one, this machine; without it, slow owners.)")
      .def("choose", &choose, "layer"_a, "experts"_a, R"(
        Give each expert of a layer to a candidate: one that has it in memory, otherwise the one that is done first.

        Assigns hits first, because a busy drive does not delay them, and then each miss to the host with the shorter
        queue; on a tie the first owner wins. Leaves out experts without a candidate.

        Returns:
            owners with their experts, in the order of `experts`.)")
      .def("split_guess", &Owners::split_guess, "layer"_a, "by_rank"_a, R"(
        Split a guess of a layer's experts among the hosts that will be asked.

        Returns:
            experts by host and rank; nothing for a host that has everything in memory.)")
      .def(
          "is_usable", [](const Owners& owners, const Owner& owner) { return owners.is_usable(owner); },
          "owner"_a, "Whether an owner can take requests now and is expected to answer in time.");

  nb::class_<AskedCounts>(m, "AskedCounts", R"(
    Experts requested from owners, counted once per layer and step; a hit was probably in the owner's memory.)")
      .def_ro("lookups", &AskedCounts::lookups)
      .def_ro("hits", &AskedCounts::hits)
      .def_ro("decode_lookups", &AskedCounts::decode_lookups)
      .def_ro("decode_hits", &AskedCounts::decode_hits);

  using Begun = GroupExperts::Begun;
  nb::class_<Begun>(m, "BegunLayer", R"(
    A layer whose experts were requested from owners. The caller that takes it over forgets its ticket.)")
      .def_ro("layer", &Begun::layer)
      .def_ro("ticket", &Begun::ticket)
      .def_ro("owners", &Begun::owners, "The table that it began with.")
      .def_ro("done", &Begun::done, "Experts whose outputs have arrived.")
      .def_prop_ro("shares", &shares_of,
                   "(owner, peer, experts that it still owes, deadline in seconds of `time.monotonic`).")
      .def_ro("failures", &Begun::failures);

  nb::class_<BoundGroupExperts, LayerExperts>(m, "GroupExperts", R"(
    The experts of a group's layers, run by their owners without Python as long as nothing goes wrong.

    When an owner fails, is late, or takes long, the stack stops at the layer; `take_over` returns what was begun.)")
      .def(nb::init<BoundExchange&>(), nb::keep_alive<1, 2>(), "exchange"_a)
      .def("use", &BoundGroupExperts::use, "owners"_a, "table"_a.none(), R"(
        Before a step: set the owners of experts.

        Args:
            table: experts in memory here. None: a step stops at a layer of which this machine runs experts.)")
      .def(
          "take_over",
          [](BoundGroupExperts& bound) {
            nb::gil_scoped_release released;
            return bound.take_over();
          },
          "The layer at which the stack stopped, if it was begun; otherwise None.")
      .def(
          "abandon", [](BoundGroupExperts& bound) { bound.abandon(); },
          nb::call_guard<nb::gil_scoped_release>(), "Forget a layer that was begun, if there is one.")
      .def(
          "guess",
          [](BoundGroupExperts& bound, const Owners& owners, int64_t layer,
             const std::vector<std::vector<int32_t>>& by_rank, bool is_sweep) {
            nb::gil_scoped_release released;
            return bound.guess_for(owners, layer, by_rank, is_sweep);
          },
          "owners"_a, "layer"_a, "by_rank"_a, nb::kw_only(), "is_sweep"_a, R"(
        Pass a guess (`ExpertRunner.guess`) on to the workers concerned; return the ranks of this machine.)")
      .def_static(
          "wants_guess", [](const Owners& owners) { return GroupExperts::wants_guess(owners); }, "owners"_a,
          "Whether a guess would help a worker.")
      .def(
          "patience_s",
          [](const BoundGroupExperts& bound, const Owner& owner, int64_t peer, int64_t layer,
             int64_t num_rows, const std::vector<int32_t>& experts) {
            require_range("num_rows", num_rows, 0, INT32_MAX);
            nb::gil_scoped_release released;
            return seconds_of(bound.patience(owner, peer, layer, num_rows, experts));
          },
          "owner"_a, "peer"_a, "layer"_a, "num_rows"_a, "experts"_a, R"(
        Seconds until an answer is late: max(4 * usual, 50 ms + bytes / bandwidth).

        While the times of an owner are hardly known, it has a second, twice the time of its reads, and some more.)")
      .def("count_asked", &GroupExperts::count_asked, "owner"_a, "layer"_a, "dispatch"_a, "experts"_a,
           "Count experts requested from a worker.")
      .def_prop_ro("counts", &GroupExperts::counts);
}

// A worker's text may be anything.
nb::str text_of(const std::string& text) {
  return nb::steal<nb::str>(PyUnicode_DecodeUTF8(text.data(), Py_ssize_t(text.size()), "replace"));
}

nb::bytes bytes_of(const std::string& text) { return nb::bytes(text.data(), text.size()); }

}  // namespace

void bind_cluster(nb::module_& m) {
  nb::exception<LinkError>(m, "LinkError", PyExc_ConnectionError);

  nb::class_<ExchangeTimes>(m, "ExchangeTimes", R"(
    Microseconds from sending requests to their last outputs: a moving average, in which the latest counts for an
    eighth, and quantiles of the latest 64.)")
      .def_ro("count", &ExchangeTimes::count)
      .def_ro("ewma_us", &ExchangeTimes::ewma_us)
      .def_ro("p50_us", &ExchangeTimes::p50_us)
      .def_ro("p99_us", &ExchangeTimes::p99_us);

  nb::class_<PeerStats>(m, "PeerStats", R"(
    One connection of an `Exchange`, up to now. `queued_bytes` wait for the socket; `num_late` experts were answered
    after another peer, or after their ticket was forgotten. Requests of at most 32 rows are in `few_rows`.)")
      .def_ro("is_connected", &PeerStats::is_connected)
      .def_ro("failure", &PeerStats::failure, "Why it is not connected; empty if it is.")
      .def_ro("num_outstanding", &PeerStats::num_outstanding, "Requests without a complete answer.")
      .def_ro("oldest_outstanding_us", &PeerStats::oldest_outstanding_us)
      .def_ro("num_late", &PeerStats::num_late)
      .def_ro("bytes_out", &PeerStats::bytes_out)
      .def_ro("bytes_in", &PeerStats::bytes_in)
      .def_ro("queued_bytes", &PeerStats::queued_bytes)
      .def_ro("few_rows", &PeerStats::few_rows)
      .def_ro("many_rows", &PeerStats::many_rows);

  nb::class_<ExchangeEvent>(m, "ExchangeEvent", R"(
    Without a failure: the outputs of `experts` are in `out`. With one: the peer does not send those of `experts`.

    ended: the connection was closed or lost. protocol: the peer broke the protocol. silent: it sent nothing for too
    long. These close the connection. refused: the peer refused the request, with `code`. full: it has 16 requests
    without an answer, and this one was not sent.)")
      .def_ro("peer", &ExchangeEvent::peer)
      .def_ro("experts", &ExchangeEvent::experts)
      .def_prop_ro("failure",
                   [](const ExchangeEvent& event) -> std::optional<FailureName> {
                     if (!event.failure) return std::nullopt;
                     return FailureName(name_of(*event.failure));
                   })
      .def_ro("code", &ExchangeEvent::code)
      .def_prop_ro("message", [](const ExchangeEvent& event) { return text_of(event.message); });

  nb::class_<BoundExchange>(m, "Exchange", R"(
    The coordinator's connections to its workers. Any thread may call it; no call waits for a peer but `receive`.

    Args:
        num_experts: routed experts of each layer; 0: a layer without.
        most_rows, most_assignments: limits of one request; the workers' limits are the same.)")
      .def(
          "__init__",
          [](BoundExchange* self, int64_t hidden, std::vector<int32_t> num_experts, int64_t most_rows,
             int64_t most_assignments) {
            new (self)
                BoundExchange(parse_limits(hidden, std::move(num_experts), most_rows, most_assignments));
          },
          nb::kw_only(), "hidden"_a, "num_experts"_a, "most_rows"_a, "most_assignments"_a)
      .def(
          "add", [](BoundExchange& bound, int fd) { return bound.exchange().add(fd); }, "fd"_a,
          nb::call_guard<nb::gil_scoped_release>(), R"(
        Take over a connected stream socket with a `WorkerLink` at its other end; return the peer's id.

        Raises:
            ValueError: `fd` is not such a socket, and stays the caller's; or there are 256 peers.)")
      .def(
          "remove", [](BoundExchange& bound, int64_t peer) { bound.exchange().remove(peer); }, "peer"_a,
          nb::call_guard<nb::gil_scoped_release>(), "Close a connection and forget its statistics.")
      .def_prop_ro(
          "peers",
          [](BoundExchange& bound) {
            nb::gil_scoped_release released;
            return bound.exchange().peers();
          },
          "The connected peers.")
      .def("send", &BoundExchange::send, "layer"_a, "dispatch"_a, "rows"_a, "out"_a.noconvert(), "shares"_a,
           R"(
        Ask peers for outputs of a dispatch; return a ticket, which must be forgotten in the end.

        `rows` and `out` stay in use until then; `out` is written only inside `receive`. A peer that is gone or full is
        an event of the ticket.

        Args:
            rows: [tokens, hidden].   out: [assignments, hidden].
            shares: the experts that each peer runs.

        Raises:
            ValueError: no token chose an expert, a request exceeds the limits, no peer ever had an id, or there are 64
                tickets. Nothing was sent then.)")
      .def("resend", &BoundExchange::resend, "ticket"_a, "shares"_a,
           "Ask further peers for missing experts; the first complete answer wins.")
      .def("receive", &BoundExchange::receive, "ticket"_a, "timeout_us"_a, R"(
        Wait for events of a ticket; empty if the time is over, or if no peer owes it an answer.)")
      .def("drop", &BoundExchange::drop, "ticket"_a, "experts"_a, R"(
        The caller writes the outputs of these experts from now on; answers that still arrive for them are dropped.

        Raises:
            ValueError: no token chose an expert; nothing was dropped then.)")
      .def("forget", &BoundExchange::forget, "ticket"_a,
           "Cancel open requests. Nothing reads `rows` or writes `out` after this.")
      .def(
          "guess",
          [](BoundExchange& bound, int64_t peer, int64_t layer,
             const std::vector<std::vector<int32_t>>& by_rank,
             bool is_sweep) { bound.exchange().guess(peer, layer, by_rank, is_sweep); },
          "peer"_a, "layer"_a, "by_rank"_a, nb::kw_only(), "is_sweep"_a,
          nb::call_guard<nb::gil_scoped_release>(), R"(
        Tell a peer which experts may be requested next (`ExpertRunner.guess`); dropped if the peer is gone or
        full.)")
      .def(
          "tend",
          [](BoundExchange& bound, int64_t silence_us) {
            require_range("silence_us", silence_us, 0, kMostWaitMs * 1000);
            nb::gil_scoped_release released;
            return bound.exchange().tend(microseconds(silence_us));
          },
          "silence_us"_a, R"(
        Ping idle peers, drop late answers, and give up peers that owe something and sent nothing for `silence_us`.

        To be called about once a second from a background thread. A peer that a ticket waits for has seven times as
        long.

        Returns:
            the peers that failed in here, and why.)")
      .def(
          "status",
          [](BoundExchange& bound, int64_t peer) {
            std::string status;
            {
              nb::gil_scoped_release released;
              status = bound.exchange().status(peer);
            }
            return bytes_of(status);
          },
          "peer"_a, "The status of a worker when it last answered `tend`; empty before.")
      .def(
          "stats", [](BoundExchange& bound, int64_t peer) { return bound.exchange().stats(peer); }, "peer"_a,
          nb::call_guard<nb::gil_scoped_release>())
      .def("inject", &inject, "peer"_a, nb::kw_only(), "delay_us"_a = 0, "bytes_per_s"_a = nb::none(),
           "bytes_to_live"_a = nb::none(), "is_stalled"_a = false, R"(
        For tests and benchmarks: make a connection faulty from now on.

        Args:
            delay_us: from `send` to the first byte on the wire.
            bytes_per_s: in each direction.
            bytes_to_live: after so many bytes in both directions, the connection is lost.
            is_stalled: nothing moves.)")
      .def_prop_ro(
          "buffer_bytes",
          [](BoundExchange& bound) {
            nb::gil_scoped_release released;
            return bound.exchange().buffer_bytes();
          },
          "Bytes of all buffers now.")
      .def(
          "close", [](BoundExchange& bound) { bound.exchange().close(); },
          nb::call_guard<nb::gil_scoped_release>(), "Close all connections.");

  bind_owners(m);

  nb::class_<WorkerRequest>(m, "WorkerRequest", R"(
    Rows and assignments of a request, with their own numbering. The arrays are the link's memory, which the next
    request overwrites.)")
      .def_ro("layer", &WorkerRequest::layer)
      .def_ro("dispatch", &WorkerRequest::dispatch)
      .def_prop_ro("rows", &rows_of, nb::rv_policy::automatic, "[rows, hidden]")
      .def_prop_ro("out", &out_of, nb::rv_policy::automatic, "[assignments, hidden], to be written.");

  nb::class_<WorkerGuess>(m, "WorkerGuess", "The experts that the coordinator may request next.")
      .def_prop_ro("layer", [](const WorkerGuess& bound) { return bound.guess.layer; })
      .def_prop_ro("by_rank", [](const WorkerGuess& bound) { return bound.guess.by_rank; })
      .def_prop_ro("is_sweep", [](const WorkerGuess& bound) { return bound.guess.is_sweep; });

  nb::class_<BoundWorkerLink>(m, "WorkerLink", R"(
    A worker's end of one connection: one request after another. One thread serves it; any thread may call
    `interrupt`, `close` and `status`.

    Takes over `fd`, a connected stream socket. Its memory is `worker_link_bytes`, from the start.

    Raises:
        ValueError: `fd` is not such a socket, and stays the caller's.   MemoryError.)")
      .def(
          "__init__",
          [](BoundWorkerLink* self, int fd, int64_t hidden, std::vector<int32_t> num_experts,
             int64_t most_rows, int64_t most_assignments) {
            new (self) BoundWorkerLink(
                fd, parse_limits(hidden, std::move(num_experts), most_rows, most_assignments));
          },
          "fd"_a, nb::kw_only(), "hidden"_a, "num_experts"_a, "most_rows"_a, "most_assignments"_a)
      .def("next", &next, "most_ms"_a = nb::none(), R"(
        Wait for a request or a guess; "idle" after `most_ms`, "interrupted" after `interrupt`, None at the end.

        Raises:
            LinkError: the coordinator broke the protocol, or the connection was lost inside a request; it is closed.
            ValueError: the current request has experts without an answer, or another thread serves the link.)")
      .def(
          "answer",
          [](BoundWorkerLink& bound, const std::vector<int32_t>& experts) {
            bound.serve([&](WorkerLink& link) { link.answer(experts); });
          },
          "experts"_a, R"(
        Send the outputs of some experts of the request, each once. Does nothing if the request was cancelled.

        Raises:
            LinkError: the connection was lost.   ValueError: an expert waits for no answer.)")
      .def(
          "refuse",
          [](BoundWorkerLink& bound, int code, const std::string& message) {
            bound.serve([&](WorkerLink& link) { link.refuse(code, message); });
          },
          "code"_a, "message"_a, "End the request without the outputs that were not sent.")
      .def_prop_ro(
          "is_cancelled",
          [](BoundWorkerLink& bound) {
            return bound.serve([](WorkerLink& link) { return link.is_cancelled(); });
          },
          "Whether the request was cancelled, which ends it. Never waits.")
      .def("serve_resident", &serve_resident, "runtime"_a, "table"_a, R"(
        Answer requests from a table, without Python.

        Returns:
            False when the connection has ended. True after `interrupt`, and when a request needs an expert that has no
            place, which `next` then returns.

        Raises:
            what `next` and `ExpertTable.run` raise.)")
      .def(
          "interrupt", [](BoundWorkerLink& bound) { bound.link().interrupt(); },
          "Make the running call of `next` or `serve_resident`, or the following one, return.")
      .def_prop_rw(
          "status", [](BoundWorkerLink& bound) { return bytes_of(bound.link().status()); },
          [](BoundWorkerLink& bound, const nb::bytes& status) {
            bound.link().set_status(std::string(status.c_str(), status.size()));
          },
          "At most 4096 bytes that the coordinator sees after `Exchange.tend`.")
      .def_prop_ro(
          "buffer_bytes",
          [](BoundWorkerLink& bound) { return WorkerLink::buffer_bytes(bound.link().limits()); },
          "The bytes of its buffers.")
      .def(
          "close", [](BoundWorkerLink& bound) { bound.link().close(); },
          "End the connection; a running call of `next` returns None.");

  m.def(
      "worker_link_bytes",
      [](int64_t hidden, std::vector<int32_t> num_experts, int64_t most_rows, int64_t most_assignments) {
        const LinkLimits limits = parse_limits(hidden, std::move(num_experts), most_rows, most_assignments);
        limits.check();
        return WorkerLink::buffer_bytes(limits);
      },
      nb::kw_only(), "hidden"_a, "num_experts"_a, "most_rows"_a, "most_assignments"_a,
      "Bytes of the buffers of a `WorkerLink`.");
  m.def(
      "exchange_bytes",
      [](int64_t hidden, std::vector<int32_t> num_experts, int64_t most_rows, int64_t most_assignments,
         int64_t num_peers) {
        const LinkLimits limits = parse_limits(hidden, std::move(num_experts), most_rows, most_assignments);
        limits.check();
        require_range("num_peers", num_peers, 0, Exchange::kMostPeers);
        return Exchange::most_buffer_bytes(limits, num_peers);
      },
      nb::kw_only(), "hidden"_a, "num_experts"_a, "most_rows"_a, "most_assignments"_a, "num_peers"_a,
      "Most bytes of the buffers of an `Exchange`.");
  m.def(
      "sources_hash", [] { return std::string(kSourcesHash); },
      "64 hexadecimal digits: a hash of the sources that decide the bits of a sum; the compiler is not part "
      "of it.");
}

}  // namespace argosy
