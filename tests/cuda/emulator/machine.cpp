// The order of things: which blocks are resident, which thread has the turn, and what ends a launch early.
#include "machine.h"

#include <algorithm>
#include <cfenv>
#include <csetjmp>
#include <csignal>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <pthread.h>

#include "blocks.h"
#include "copies.h"

namespace emulator {

Thread *current = nullptr;
const Kernel *current_kernel = nullptr;
Shape current_shape{};

namespace {

struct Failure {
    std::string sentence;
};

struct Machine {
    Context scheduler = nullptr;
    const void *args = nullptr;
    std::vector<Warp *> runnable;
    std::vector<std::unique_ptr<Cluster>> resident;
    std::vector<Block *> late; // blocks of resident clusters that have not begun
    std::string failure;
    uint64_t random = 1;
    uint64_t idle_turns = 0; // turns in a row that ended in pause()
    uint64_t copy_delay = 1; // turns that a copy waits, on average, while threads run
    uint64_t overtaking = 1; // turns until another warp overtakes, on average
    uint32_t elected = 0;
    uint64_t launches = 0; // since restart()
    bool running = false;
    pthread_t host_thread{};
    Stacks stacks;
    sigjmp_buf escape;
};

Machine machine;
std::mutex one_launch;

uint64_t next_random() {
    machine.random ^= machine.random << 13;
    machine.random ^= machine.random >> 7;
    machine.random ^= machine.random << 17;
    return machine.random * 0x2545f4914f6cdd1dull >> 32;
}

uint64_t number_from(const char *variable, uint64_t otherwise) {
    const char *text = std::getenv(variable);
    return text && *text ? std::strtoull(text, nullptr, 10) : otherwise;
}

// Where a fiber begins and ends.
void thread_main() {
    current_kernel->run(machine.args);
    Thread &thread = *current;
    thread.state = Thread::exited;
    thread_exits(thread); // looks at who waits for it
    switch_context(&thread.context, machine.scheduler);
    abort();
}

void to_scheduler() { switch_context(&current->context, machine.scheduler); }

Thread &choose() {
    size_t index = machine.runnable.size() - 1; // the same warp goes on until it waits, unless another overtakes it
    if (next_random() % machine.overtaking == 0)
        index = next_random() % machine.runnable.size();
    Warp &warp = *machine.runnable[index];
    std::swap(machine.runnable[index], machine.runnable.back());
    machine.runnable[index]->position = static_cast<int64_t>(index);
    warp.position = static_cast<int64_t>(machine.runnable.size()) - 1;

    const uint32_t turn = static_cast<uint32_t>(next_random() & 31);
    const uint32_t turned = warp.ready >> turn | (turn ? warp.ready << (32 - turn) : 0);
    const uint32_t lane = (static_cast<uint32_t>(__builtin_ctz(turned)) + turn) & 31;
    warp.ready &= ~(1u << lane);
    if (!warp.ready) {
        machine.runnable.pop_back();
        warp.position = -1;
    }
    return warp.threads[lane];
}

void take_turn(Thread &thread) {
    if (thread.state == Thread::fresh) {
        thread.stack = machine.stacks.take();
        thread.context = new_context(thread.stack, thread_main);
    }
    thread.state = Thread::ready;
    current = &thread;
    switch_context(&machine.scheduler, thread.context);
    current = nullptr;
    if (thread.state == Thread::exited)
        machine.stacks.give(thread.stack);
}

std::string who_waits() {
    // Threads next to each other at the same word are one entry.
    std::string text;
    int entries = 0;
    for (const auto &cluster : machine.resident)
        for (const Block *block : cluster->blocks)
            for (size_t first = 0; first < block->threads.size();) {
                const Thread &thread = block->threads[first];
                size_t end = first + 1;
                while (end < block->threads.size() && block->threads[end].state == thread.state &&
                       block->threads[end].waits_at == thread.waits_at)
                    ++end;
                if (thread.state == Thread::waiting && ++entries <= 8)
                    text += (text.empty() ? "" : "; ") +
                            (end - first == 1
                                 ? "thread " + std::to_string(first) + " of block "
                                 : "threads " + std::to_string(first) + "-" + std::to_string(end - 1) + " of block ") +
                            std::to_string(block->index.x) + " at " + thread.waits_at;
                first = end;
            }
    text += entries > 8 ? "; and others" : "";
    for (const auto &cluster : machine.resident)
        for (const Block *block : cluster->blocks)
            text += barriers_waited_for(*block);
    return text;
}

void begin_threads(Block &block) {
    for (Thread &thread : block.threads)
        wake(thread);
}

// A cluster's blocks are resident together and begin in any order: one of them when the others wait for it.
void begin_blocks(const Cluster &cluster) {
    const size_t late = cluster.blocks.size() > 1 ? next_random() % cluster.blocks.size() : 1;
    for (size_t rank = 0; rank < cluster.blocks.size(); ++rank)
        if (rank == late)
            machine.late.push_back(cluster.blocks[rank]);
        else
            begin_threads(*cluster.blocks[rank]);
}

void run_blocks(const Shape &shape) {
    const uint64_t num_clusters = uint64_t{shape.grid.x} / shape.cluster * shape.grid.y * shape.grid.z;
    const uint64_t most_resident = std::max<uint64_t>(1, number_from("PYROUTE_EMULATED_SMS", 4) / shape.cluster);
    std::vector<uint64_t> order(num_clusters);
    std::iota(order.begin(), order.end(), uint64_t{0});
    for (uint64_t i = num_clusters; i > 1; --i)
        std::swap(order[i - 1], order[next_random() % i]);

    while (machine.failure.empty()) {
        while (!order.empty() && machine.resident.size() < most_resident) {
            machine.resident.push_back(new_cluster(shape, order.back()));
            order.pop_back();
            begin_blocks(*machine.resident.back());
        }
        if (machine.resident.empty())
            return land_all_copies();
        if (copies_under_way() && (machine.runnable.empty() || next_random() % machine.copy_delay == 0)) {
            land_a_copy(machine.runnable.empty());
            continue;
        }
        if (machine.runnable.empty() && !machine.late.empty()) {
            begin_threads(*machine.late.back());
            machine.late.pop_back();
            continue;
        }
        if (machine.runnable.empty())
            throw Failure{"deadlock, every thread waits: " + who_waits()};
        Thread &thread = choose();
        take_turn(thread);
        if (thread.state == Thread::exited && machine.failure.empty() && --thread.block->cluster->live_threads == 0) {
            Cluster *done = thread.block->cluster;
            end_cluster(*done);
            machine.resident.erase(std::find_if(machine.resident.begin(), machine.resident.end(),
                                                [done](const auto &cluster) { return cluster.get() == done; }));
        }
    }
}

// An access that the host's memory protection catches ends the launch, not the process.
struct sigaction handlers_before[4];
constexpr int caught[4] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};

void on_signal(int signal, siginfo_t *info, void *context) {
    if (!machine.running || !pthread_equal(pthread_self(), machine.host_thread)) { // not ours
        for (int i = 0; i < 4; ++i)
            if (caught[i] == signal) {
                sigaction(signal, &handlers_before[i], nullptr);
                if (handlers_before[i].sa_flags & SA_SIGINFO)
                    handlers_before[i].sa_sigaction(signal, info, context);
            }
        return;
    }
    char address[32];
    snprintf(address, sizeof(address), "%p", info->si_addr);
    const std::string who = current ? name_of(*current) : "the copy engine";
    if (machine.stacks.guards(info->si_addr))
        machine.failure = who + " overflowed its stack";
    else if (signal == SIGSEGV || signal == SIGBUS)
        machine.failure = who + " accessed memory that is not there, at " + address;
    else
        machine.failure = who + (signal == SIGFPE ? " divided by zero" : " met a trap or a misaligned address");
    siglongjmp(machine.escape, 1);
}

class CatchSignals {
  public:
    CatchSignals() : stack_(64 * 1024) {
        stack_t alternate{};
        alternate.ss_sp = stack_.data();
        alternate.ss_size = stack_.size();
        sigaltstack(&alternate, &stack_before_);
        struct sigaction action{};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 4; ++i)
            sigaction(caught[i], &action, &handlers_before[i]);
    }
    ~CatchSignals() {
        for (int i = 0; i < 4; ++i)
            sigaction(caught[i], &handlers_before[i], nullptr);
        sigaltstack(&stack_before_, nullptr);
    }

  private:
    std::vector<char> stack_;
    stack_t stack_before_{};
};

// The order is a function of the seed and the launch's number, and so is how much of it is disorder.
void seed_launch() {
    uint64_t x = number_from("PYROUTE_EMULATOR_SEED", 0) * 0x9e3779b97f4a7c15ull + ++machine.launches;
    for (uint64_t factor : {0xbf58476d1ce4e5b9ull, 0x94d049bb133111ebull})
        x = (x ^ x >> 29) * factor;
    machine.random = (x ^ x >> 32) | 1;
    machine.overtaking = uint64_t{1} << next_random() % 7;
    machine.copy_delay = uint64_t{1} << next_random() % 9;
    machine.elected = random_below(32);
}

} // namespace

void restart() {
    const std::lock_guard<std::mutex> lock(one_launch);
    machine.launches = 0;
}

std::string run(const Kernel &kernel, const Shape &shape, const void *args) {
    const std::lock_guard<std::mutex> lock(one_launch);
    seed_launch();
    watch_launch();
    current_kernel = &kernel;
    machine.args = args;
    machine.failure.clear();
    machine.idle_turns = 0;
    current_shape = shape;

    std::fenv_t mode; // a device knows nothing of the host thread's rounding and flushing
    std::fegetenv(&mode);
    std::fesetenv(FE_DFL_ENV);
    {
        const CatchSignals guard;
        machine.host_thread = pthread_self();
        machine.running = true;
        try {
            if (sigsetjmp(machine.escape, 1) == 0)
                run_blocks(shape);
        } catch (const Failure &failure) {
            machine.failure = failure.sentence;
        }
        machine.running = false;
    }
    std::fesetenv(&mode);

    current = nullptr;
    forget_copies();
    machine.runnable.clear();
    machine.late.clear();
    machine.resident.clear();
    machine.stacks.give_all();
    return machine.failure;
}

void fail(const std::string &sentence) {
    if (!current)
        throw Failure{sentence};
    machine.failure = name_of(*current) + ": " + sentence;
    to_scheduler();
    abort();
}

std::string name_of(const Thread &thread) {
    const Index3 &block = thread.block_index;
    std::string name = "thread " + std::to_string(thread.index.x) + " of block " + std::to_string(block.x);
    return block.y || block.z ? name + "," + std::to_string(block.y) + "," + std::to_string(block.z) : name;
}

void wait(const char *word) {
    machine.idle_turns = 0;
    current->state = Thread::waiting;
    current->waits_at = word;
    to_scheduler();
}

void wake(Thread &thread) {
    Warp &warp = *thread.warp;
    if (thread.state == Thread::waiting)
        thread.state = Thread::ready;
    warp.ready |= 1u << thread.lane;
    if (warp.position < 0) {
        warp.position = static_cast<int64_t>(machine.runnable.size());
        machine.runnable.push_back(&warp);
    }
}

void pause(const char *word) {
    static constexpr uint64_t patience = 1u << 20;
    if (++machine.idle_turns > patience)
        fail(std::string("waits at ") + word + " for what never comes");
    Thread &thread = *current;
    wake(thread);
    // another warp has the next turn, if there is one
    Warp &first = *machine.runnable[next_random() % machine.runnable.size()];
    std::swap(machine.runnable[static_cast<size_t>(first.position)], machine.runnable.back());
    machine.runnable[static_cast<size_t>(first.position)]->position = first.position;
    first.position = static_cast<int64_t>(machine.runnable.size()) - 1;
    to_scheduler();
}

void maybe_pause() {
    if (next_random() % 4 == 0) {
        const uint64_t idle = machine.idle_turns;
        pause("an atomic operation");
        machine.idle_turns = idle;
    }
}

uint32_t elected_lane() { return machine.elected; }

uint32_t random_below(uint32_t n) { return static_cast<uint32_t>(next_random() % n); }

} // namespace emulator
