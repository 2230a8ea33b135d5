// The CPU kernel in another process: compiled by another compiler, or for another processor and emulated (other_cpus.py).
//
// With EPSKERNELS_SERVER this is that process: no torch, the kernel of csrc/step_cpu.cpp, and a loop that reads a call from its
// standard input and answers on its standard output. Without, it stands in the place of cpu_capability.cpp below csrc/ops_cpu.cpp,
// which checks the arguments and shares out the tiles as ever: its kernels send each call to the server, with the elements that the
// call may read, and write what comes back.
#include <sys/types.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu_capability.h"
#include "step_cpu.h"

namespace epskernels {
namespace {

enum Function : int32_t { STEP, STEP_BY_BAND, MOMENTS, NORMAL };

// Tensors of one step, as StepOperands holds them; the second half of a doubled model_input is one more.
constexpr Batch StepOperands::*TENSORS[] = {
    &StepOperands::x, &StepOperands::f, &StepOperands::u, &StepOperands::m1, &StepOperands::m2, &StepOperands::y, &StepOperands::v,
    &StepOperands::grad, &StepOperands::noise, &StepOperands::out, &StepOperands::m0, &StepOperands::y_out, &StepOperands::model_input};
constexpr int TENSOR_COUNT = sizeof TENSORS / sizeof TENSORS[0], MODEL_INPUT = TENSOR_COUNT - 1;
constexpr int PLACES = TENSOR_COUNT + 1;

// The same bytes in either process: both are little-endian, with 64-bit pointers.
struct Call {
  Function function;
  int32_t region_of[PLACES];  // which region a tensor's elements are; -1: it is absent. Two tensors may share one.
  int32_t regions;
  StepOperands step;
  MomentsOperands moments;
  Sample sample;
  float row[WIDE_ROW_COLUMNS];
  int64_t begin, end;  // elements; or strips
  bool stream;         // of a step: past the caches
  bool flush;          // the processor is told to take float32's subnormals for zeros
  Dtype dtype;         // of the normals
  uint32_t draw, noise_stream;
  uint64_t seed;
  float g;
  int64_t guided;
};

// Elements of a sample, that follow one another. They come to lie at an address with the same remainder by 64.
struct Region {
  uint64_t address;
  int64_t bytes;
  bool written;
};

bool read_all(int file, void* target, size_t count) {
  for (char* at = static_cast<char*>(target); count > 0;) {
    const ssize_t got = read(file, at, count);
    if (got <= 0) return false;
    at += got, count -= got;
  }
  return true;
}

bool write_all(int file, const void* source, size_t count) {
  for (const char* at = static_cast<const char*>(source); count > 0;) {
    const ssize_t put = write(file, at, count);
    if (put <= 0) return false;
    at += put, count -= put;
  }
  return true;
}

bool is_f(int tensor) {
  const auto member = TENSORS[tensor];
  return member == &StepOperands::f || member == &StepOperands::u || member == &StepOperands::v || tensor == MODEL_INPUT;
}

}  // namespace
}  // namespace epskernels

#if defined(EPSKERNELS_SERVER)

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace epskernels {
namespace {

constexpr int64_t GUARD = 64;

void give_up(const char* why) {
  std::fprintf(stderr, "other_cpus: %s\n", why);
  std::exit(1);
}

// A region's bytes, between others that nothing may write; these are another number in each, which a copy would not have.
struct Room {
  Region region;
  unsigned char guard;
  char* memory;
  char* data;

  Room(const Region& region, int number) : region(region), guard(static_cast<unsigned char>(0xa0 + number)) {
    memory = static_cast<char*>(std::aligned_alloc(64, (region.bytes + 64 + 2 * GUARD + 63) / 64 * 64));
    data = memory + GUARD + region.address % 64;
    std::memset(memory, guard, data - memory);
    std::memset(data + region.bytes, guard, GUARD);
  }
  void check() const {
    for (const char* at = memory; at < data; ++at)
      if (static_cast<unsigned char>(*at) != guard) give_up("the kernel wrote before a tensor's elements");
    for (const char* at = data + region.bytes; at < data + region.bytes + GUARD; ++at)
      if (static_cast<unsigned char>(*at) != guard) give_up("the kernel wrote behind a tensor's elements");
  }
};

// Where element 0 of the sample would lie.
char* start_of(const std::vector<Room>& rooms, int32_t region, int64_t begin, Dtype dtype) {
  return region < 0 ? nullptr : rooms[region].data - begin * size_of(dtype);
}

void flush_subnormals(bool flush) {
#if defined(__SSE2__)
  _mm_setcsr((_mm_getcsr() & ~0x8040u) | (flush ? 0x8040u : 0u));
#else
  uint64_t control;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  control = (control & ~(1u << 24)) | uint64_t{flush} << 24;
  asm volatile("msr fpcr, %0" : : "r"(control));
#endif
}

void run(Call& call, const std::vector<Room>& rooms, double* sums) {
  const CpuKernels& kernels = cpu_kernels();
  if (call.function == NORMAL) {
    kernels.normal(call.seed, call.draw, call.noise_stream, call.dtype, rooms[0].data, call.begin, call.end);
  } else if (call.function == MOMENTS) {
    MomentsOperands& a = call.moments;
    a.f = {start_of(rooms, call.region_of[0], call.begin, a.dtype), 0};
    a.u = {start_of(rooms, call.region_of[1], call.begin, a.dtype), 0};
    kernels.moments(a, 0, call.g, call.guided, call.begin, call.end - call.begin, sums);
  } else {
    StepOperands& a = call.step;
    const Strips strips(a);
    const bool by_band = call.function == STEP_BY_BAND;
    const int64_t begin = by_band ? strips.begin(call.begin) : call.begin;
    for (int i = 0; i < TENSOR_COUNT; ++i)
      a.*TENSORS[i] = {start_of(rooms, call.region_of[i], begin, is_f(i) ? a.f_dtype : a.x_dtype), 0};
    a.batch = 1;
    if (a.doubled) a.model_input.stride = rooms[call.region_of[TENSOR_COUNT]].data - rooms[call.region_of[MODEL_INPUT]].data;
    call.sample.row = reinterpret_cast<const StepRow*>(call.row);
    const StepCall step{a, &call.sample, call.stream};
    if (by_band) kernels.step_by_band(step, 0, strips, call.begin, call.end);
    else kernels.step(step, 0, call.begin, call.end);
  }
}

void serve() {
  const uint64_t hello = sizeof(Call);
  write_all(1, &hello, sizeof hello);
  for (Call call; read_all(0, &call, sizeof call);) {
    std::vector<Room> rooms;
    for (int i = 0; i < call.regions; ++i) {
      Region region;
      if (!read_all(0, &region, sizeof region)) give_up("a call was cut off");
      rooms.emplace_back(region, i);
      if (!read_all(0, rooms[i].data, region.bytes)) give_up("a call was cut off");
    }
    double sums[4] = {};
    flush_subnormals(call.flush);
    run(call, rooms, sums);
    for (const Room& room : rooms) room.check();
    if (!write_all(1, sums, sizeof sums)) give_up("nobody reads the answer");
    for (const Room& room : rooms) {
      if (room.region.written && !write_all(1, room.data, room.region.bytes)) give_up("nobody reads the answer");
      std::free(room.memory);
    }
  }
}

}  // namespace
}  // namespace epskernels

// NAME: the instruction set.
int main(int, char** arguments) {
  epskernels::set_cpu_capability(arguments[1]);
  epskernels::serve();
}

#else

#include <immintrin.h>
#include <sys/socket.h>

#include <map>
#include <mutex>
#include <stdexcept>

namespace epskernels {
namespace {

class Server {
 public:
  void use(const std::string& wanted) {
    const std::lock_guard<std::mutex> lock(mutex);
    command = wanted;
  }

  // Sends the call, and has what it writes written. sums: room for four.
  void run(Call& call, const std::vector<Region>& regions, double* sums) {
    const std::lock_guard<std::mutex> lock(mutex);
    const int file = connection();
    call.regions = static_cast<int32_t>(regions.size());
    call.flush = _mm_getcsr() & 0x8040u;
    bool good = write_all(file, &call, sizeof call);
    for (const Region& region : regions)
      good = good && write_all(file, &region, sizeof region) && write_all(file, reinterpret_cast<const void*>(region.address), region.bytes);
    double answered[4];
    good = good && read_all(file, answered, sizeof answered);
    for (const Region& region : regions)
      good = good && (!region.written || read_all(file, reinterpret_cast<void*>(region.address), region.bytes));
    if (!good) fail("ended in a call");
    if (sums) std::memcpy(sums, answered, (call.moments.u.data ? 4 : 2) * sizeof(double));
  }

 private:
  std::mutex mutex;
  std::string command;
  std::map<std::pair<pid_t, std::string>, int> files;  // a forked process starts servers of its own

  [[noreturn]] void fail(const char* what) {
    files.erase({getpid(), command});
    std::fprintf(stderr, "other_cpus: '%s' %s\n", command.c_str(), what);  // torch's threads keep an error's text to themselves
    throw std::runtime_error("other_cpus: see above");
  }

  int connection() {
    int& file = files[{getpid(), command}];
    if (file > 0) return file;
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) fail("has no socket");
    if (fork() == 0) {
      dup2(ends[1], 0);
      dup2(ends[1], 1);
      execl("/bin/sh", "sh", "-c", ("exec " + command).c_str(), nullptr);
      _exit(127);
    }
    close(ends[1]);
    uint64_t hello;
    if (!read_all(ends[0], &hello, sizeof hello)) fail("did not start");
    if (hello != sizeof(Call)) fail("lays a call out differently");
    return file = ends[0];
  }
};

Server& server() {
  static Server server;
  return server;
}

constexpr int FIRST_OUTPUT = 9;  // of TENSORS

class Regions {
 public:
  std::vector<Region> all;

  int32_t add(char* address, int64_t bytes, bool written) {
    const uint64_t begin = reinterpret_cast<uint64_t>(address), end = begin + bytes;
    for (size_t i = 0; i < all.size(); ++i) {
      Region& other = all[i];
      if (other.address == begin && other.bytes == bytes) {
        other.written |= written;
        return static_cast<int32_t>(i);
      }
      if ((written || other.written) && begin < other.address + other.bytes && other.address < end)
        throw std::runtime_error("other_cpus: an output overlaps another tensor in part, which csrc/arguments.h refuses");
    }
    all.push_back({begin, bytes, written});
    return static_cast<int32_t>(all.size() - 1);
  }
};

void send_step(Function function, const StepCall& step, int64_t index, int64_t first, int64_t last) {
  Call call{};
  const StepOperands& a = step.operands;
  const Strips strips(a);
  call.function = function;
  call.step = a;
  call.sample = step.samples[index];
  call.stream = step.stream;
  call.begin = first, call.end = last;
  std::memcpy(call.row, call.sample.row, (call.sample.terms & TERM_BAND ? WIDE_ROW_COLUMNS : ROW_COLUMNS) * sizeof(float));
  const int64_t begin = function == STEP_BY_BAND ? strips.begin(first) : first;
  const int64_t end = function == STEP_BY_BAND ? strips.end(last - 1) : last;
  Regions regions;
  for (int i = 0; i < PLACES; ++i) {
    const int tensor = i < TENSOR_COUNT ? i : MODEL_INPUT;
    const Batch& batch = a.*TENSORS[tensor];
    const int64_t size = size_of(is_f(tensor) ? a.f_dtype : a.x_dtype), sample = i < TENSOR_COUNT ? index : index + a.batch;
    const bool present = batch.data && (i < TENSOR_COUNT || a.doubled);
    char* data = batch.data + sample * batch.stride + begin * size;
    call.region_of[i] = present ? regions.add(data, (end - begin) * size, i >= FIRST_OUTPUT) : -1;
  }
  server().run(call, regions.all, nullptr);
}

void step(const StepCall& call, int64_t index, int64_t begin, int64_t end) { send_step(STEP, call, index, begin, end); }

void step_by_band(const StepCall& call, int64_t index, const Strips&, int64_t first, int64_t last) {
  send_step(STEP_BY_BAND, call, index, first, last);
}

void moments(const MomentsOperands& a, int64_t index, float g, int64_t guided, int64_t begin, int64_t count, double* sums) {
  Call call{};
  call.function = MOMENTS;
  call.moments = a;
  call.g = g, call.guided = guided;
  call.begin = begin, call.end = begin + count;
  Regions regions;
  const int64_t size = size_of(a.dtype);
  call.region_of[0] = regions.add(a.f.data + index * a.f.stride + begin * size, count * size, false);
  call.region_of[1] = a.u.data ? regions.add(a.u.data + index * a.u.stride + begin * size, count * size, false) : -1;
  server().run(call, regions.all, sums);
}

void normal(uint64_t seed, uint32_t draw, uint32_t stream, Dtype dtype, char* out, int64_t begin, int64_t end) {
  Call call{};
  call.function = NORMAL;
  call.seed = seed, call.draw = draw, call.noise_stream = stream, call.dtype = dtype;
  call.begin = begin, call.end = end;
  Regions regions;
  regions.add(out, (end - begin) * size_of(dtype), true);
  server().run(call, regions.all, nullptr);
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels kernels{"other", &step, &step_by_band, &moments, &normal};
  return kernels;
}

}  // namespace epskernels

// Later calls go to the process that this command starts.
extern "C" EPSKERNELS_EXPORT void use_server(const char* command) { epskernels::server().use(command); }

// Normals of elements anywhere in a sample, float32. 0: the server ended.
extern "C" EPSKERNELS_EXPORT int other_normals(uint64_t seed, uint32_t draw, uint32_t stream, int64_t begin, int64_t count, float* out) {
  try {
    epskernels::normal(seed, draw, stream, epskernels::Dtype::float32, reinterpret_cast<char*>(out), begin, begin + count);
    return 1;
  } catch (const std::exception&) {
    return 0;
  }
}

#endif
