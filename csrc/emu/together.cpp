// Blocks of one launch that run at once and wait for each other through counters in global memory.
//
// Time is counted by each block's barriers. A signal tells of all accesses of its block before the last barrier, and of what the block knew
// of others; who awaits it knows of them after its own next barrier. Of two accesses to one place of global memory, one of them a write,
// the earlier one has to be known to the block of the later: a missing barrier, a counter that is not awaited, a workspace that is
// written while others still read it are found whatever the order in which the blocks happened to run.
#include "emu.h"

namespace emu {

std::unique_ptr<Together> start_together(long blocks) {
  auto together = std::make_unique<Together>();
  together->known.assign(blocks, std::vector<unsigned>(blocks, 0));
  together->coming = together->known;
  together->awaited.resize(blocks);
  for (Buffer& buffer : state().buffers)
    if (buffer.writable) buffer.written_at.assign(buffer.writer.size(), 0), buffer.reader.clear(), buffer.read_at.clear();
  return together;
}

static void learn(std::vector<unsigned>& to, const std::vector<unsigned>& from) {
  for (size_t i = 0; i < to.size(); i++) to[i] = std::max(to[i], from[i]);
}

void pass_barrier() {
  Together& t = *state().together;
  learn(t.known[block().index], t.coming[block().index]);
}

void signal(uint32_t* counter) {
  check_global(counter, 4, false, 4, true);
  Together& t = *state().together;
  Block& b = block();
  std::vector<unsigned>& released = t.released[counter];
  released.resize(t.known.size());
  learn(released, t.known[b.index]);
  released[b.index] = std::max(released[b.index], b.epoch);
  ++*counter;
  b.progress++;
}

void await(const uint32_t* counter, uint32_t value) {
  check_global(counter, 4, false, 4, true);
  Together& t = *state().together;
  Block& b = block();
  t.awaited[b.index] = "block " + std::to_string(b.index) + " waits for " + std::to_string(value) + " signals";
  while (static_cast<int32_t>(*counter - value) < 0) yield();
  t.awaited[b.index].clear();
  learn(t.coming[b.index], t.released[counter]);
  b.progress++;
}

std::string waiting(const Together& together) {
  std::string all;
  for (const std::string& one : together.awaited)
    if (!one.empty()) all += (all.empty() ? "" : ", ") + one;
  return all.empty() ? "threads of a block wait at a barrier, the others elsewhere" : all;
}

// Before the launch: as a kernel of its own would.
void clear(void* address, size_t bytes) {
  memset(address, 0, bytes);
}

void check_order(Buffer& buffer, size_t number, size_t element, bool write, bool coherent) {
  if (!buffer.writable) return;
  const Together& t = *state().together;
  const Block& b = block();
  const size_t blocks = t.known.size(), threads = b.fibers.size();
  const uint32_t self = 1 + b.index * threads + fiber().index, writer = buffer.writer[element];
  const char* what = write ? "write" : "read";
  auto before = [&](size_t other, unsigned epoch) { return epoch < (static_cast<long>(other) == b.index ? b.epoch : t.known[b.index][other]); };
  if (writer && writer != self) {
    const size_t other = (writer - 1) / threads;
    if (!before(other, buffer.written_at[element]))
      fail("unordered: %s at byte %zu of buffer %zu, which block %zu wrote", what, 2 * element, number, other);
    if (!write && !coherent) fail("read at byte %zu of buffer %zu, which block %zu wrote, past the caches that see it", 2 * element, number, other);
  }
  if (!write) {
    if (buffer.read_at.empty()) buffer.read_at.assign(buffer.writer.size() * blocks, 0), buffer.reader.assign(buffer.writer.size(), 0);
    buffer.read_at[element * blocks + b.index] = b.epoch + 1, buffer.reader[element] = self;
    return;
  }
  for (size_t other = 0; other < blocks && !buffer.read_at.empty(); other++) {
    uint32_t& read_at = buffer.read_at[element * blocks + other];
    const bool own = static_cast<long>(other) == b.index && buffer.reader[element] == self;
    if (read_at && !own && !before(other, read_at - 1))
      fail("unordered: write at byte %zu of buffer %zu, which block %zu still reads", 2 * element, number, other);
    read_at = 0;
  }
  buffer.written_at[element] = b.epoch;
}

}  // namespace emu
