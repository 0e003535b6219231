// cache_policy.h: decides which expert is evicted. It moves no bytes, so it can be replayed on a recorded
// trace.
//
//   CachePolicy policy(num_slots, layers, experts_per_token);
//   policy.begin(layer);                               // a turn of the layer in decode
//   policy.use(layer, hits, false);                    // pins them
//   slot = policy.admit({layer, expert}, false);       // for a miss; nullopt: wait for an unpin
//   policy.unpin(layer, experts);                      // once they have been computed
//
// The oldest expert is evicted. Its age takes three facts into account:
//
// - Layers take turns. An expert can only be needed when its layer runs, so its age is the number of turns
//   of its own layer since its last use. Among experts of equal age, the one whose layer had its turn most
//   recently is evicted, because it is needed last.
// - Use repeats. An expert is younger by kBonusTurns for each doubling of its uses; a use counts half after
//   kHalfLifeTurns. Uses are remembered after an expert is evicted.
// - Every layer comes round. A layer keeps its last floor() experts (an equal share of the slots, at most
//   experts_per_token) while another layer can give one. Otherwise, with fewer slots than one token uses,
//   each expert would be evicted just before it is needed again.
//
// Prompt tokens sweep through nearly every expert once per chunk. Experts that only prompt tokens choose
// take free slots, then only the slots of a small window, newest first: the next sweep comes in the same
// order, so the experts swept in last are needed last. Experts that decode uses stay; experts that were only
// swept in are evicted first. So are experts that were only guessed: they take no more slots than one token
// needs in a layer, and the oldest of them goes first.
//
// Finding the expert to evict takes O(log slots). Within a layer all ages grow alike, so each layer has a
// heap by a constant (worth), and one heap of the layers above their floor compares their oldest experts. An
// entry in either heap may be too old, never too young; it is corrected when it reaches the top.
#pragma once

#include <atomic>
#include <compare>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace argosy {

struct ExpertKey {
  int32_t layer, expert;
  auto operator<=>(const ExpertKey&) const = default;
};

class CachePolicy {
 public:
  static constexpr double kBonusTurns = 4.0;
  static constexpr double kHalfLifeTurns = 16.0;

  // An expert whose slot goes, and the slot that it gets instead.
  struct Move {
    ExpertKey key;
    int64_t slot, to;
  };
  // How old an expert outside the window is. Among experts of equal age, the one whose layer had its turn
  // most recently is evicted first.
  struct Age {
    ExpertKey key;
    double turns;
    int64_t last_turn;  // of its layer, in turns of all layers
    bool is_pinned;
  };

  // `layers` are those whose experts may have these slots. Functions throw std::invalid_argument for an
  // expert of another layer.
  CachePolicy(int64_t num_slots, const std::vector<int64_t>& layers, int64_t experts_per_token);

  // Changes the number of slots, numbered from 0. If there are more experts than slots, those that misses of
  // decode would displace next are evicted. The others stay in place. moves() brings experts in removed
  // slots to lower ones, which stay reserved until then. Throws std::invalid_argument if more experts are
  // pinned than there will be slots.
  void resize(int64_t num_slots);
  // Moves the experts in slots from `num_slots` on, which is no less than the number of slots. None may be
  // pinned. Returns the copies to make now, to empty slots.
  std::vector<Move> moves(int64_t num_slots);

  // Begins a layer's turn in decode: its experts are a turn older.
  void begin(int64_t layer);
  // Records hits of a layer, and pins them. A sweep does not make an expert younger.
  void use(int64_t layer, const std::vector<int32_t>& experts, bool is_scan);
  // Finds a slot for a missing expert, evicting another if necessary, and pins it. nullopt: wait for an
  // unpin. A guess is a scan that may take fewer slots from others.
  std::optional<int64_t> admit(ExpertKey key, bool is_scan, bool is_guess = false);
  void unpin(int64_t layer, const std::vector<int32_t>& experts);
  // Forgets an expert whose bytes never arrived.
  void drop(ExpertKey key);

  bool has(ExpertKey key) const;
  std::optional<int64_t> slot(ExpertKey key) const;  // of a resident expert
  std::vector<ExpertKey> resident() const;
  std::vector<ExpertKey> pinned() const;
  std::vector<Age> ages() const;
  std::vector<ExpertKey> window() const;  // swept in or guessed, the oldest first

  int64_t num_slots() const { return num_slots_; }
  int64_t num_resident() const {  // any thread may ask
    return std::atomic_ref(num_resident_).load(std::memory_order_relaxed);
  }
  int64_t floor() const { return floor_; }
  int64_t window_slots() const { return window_slots_; }  // limit of a sweep
  int64_t guess_slots() const { return experts_per_token_; }

  // The most heap memory that a policy takes, with at most `num_experts` in each layer.
  static int64_t bytes(int64_t num_slots, int64_t num_layers, int64_t num_experts);

 private:
  static constexpr ExpertKey kNone = {-1, -1};

  struct Expert {
    double worth = 0;  // of an expert outside the window
    double uses = 0;
    int64_t uses_turn = -1;                  // the turn that `uses` is from; -1: never used
    ExpertKey older = kNone, newer = kNone;  // neighbours in the window
    int32_t slot = -1;                       // -1: none
    bool is_pinned = false;
    bool is_in_window = false;

    bool is_lasting() const { return slot >= 0 && !is_in_window; }
  };
  struct Worth {
    double worth;
    int32_t expert;
    bool operator>(const Worth& other) const {
      return worth != other.worth ? worth > other.worth : expert > other.expert;
    }
  };
  struct Layer {
    int64_t number;
    int64_t turn = 0;
    int64_t passed = 0;  // minus the time of its last turn
    int64_t num_lasting = 0;
    std::vector<Expert> experts;
    std::vector<Worth> heap;
  };
  // The layer at the top gives an expert next. Entries of an earlier turn, or of a layer at its floor, are
  // void.
  struct Oldest {
    double bound;  // minus the age
    int64_t passed;
    int32_t layer;  // an index of layers_
    int64_t turn;
    bool operator>(const Oldest& other) const;
  };
  using Pinned = std::vector<std::pair<int32_t, Worth>>;

  int32_t index_of(int64_t layer) const;
  Expert& expert(int32_t index, int64_t expert);
  const Expert* find(ExpertKey key) const;
  template <class Is>
  std::vector<ExpertKey> keys_where(const Is& is) const;
  Expert& at(ExpertKey index_and_expert) {
    return layers_[size_t(index_and_expert.layer)].experts[size_t(index_and_expert.expert)];
  }
  void count(int64_t change);

  double count_use(Layer& layer, Expert& expert) const;
  void keep(int32_t index, int32_t number, int32_t slot);
  int32_t take(int32_t index, int32_t number);  // the slot of an expert outside the window
  void set_pinned(Expert& expert, bool is_pinned);
  void enter_window(int32_t index, int32_t number, int32_t slot);
  int32_t leave_window(int32_t index, int32_t number);
  void note_oldest(int32_t index);
  int32_t slot_for_sweep(int32_t index);
  int32_t from_window(bool newest);
  int32_t evict_oldest(int32_t asking);  // -1: nobody asks
  int32_t evict(int32_t asking, int64_t floor);
  std::optional<double> least_worth(int32_t index, Pinned& pinned);

  int64_t experts_per_token_;
  int64_t num_slots_ = 0, floor_ = 0, window_slots_ = 0;
  mutable int64_t num_resident_ = 0;
  int64_t clock_ = 0;
  std::vector<int32_t> index_of_;  // by layer; -1: not one of these
  std::vector<Layer> layers_;
  std::vector<int32_t> free_, reserved_;  // reserved: one for each expert in a slot that goes
  std::vector<Oldest> oldest_;
  ExpertKey window_oldest_ = kNone, window_newest_ = kNone;  // with an index of layers_
  int64_t window_size_ = 0, pinned_in_window_ = 0;
};

}  // namespace argosy
