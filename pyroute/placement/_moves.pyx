# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True
"""From an old plan to a new one with few slots that change: other names for devices, or a bounded number of changes."""

from libc.stdlib cimport free, malloc
from libc.string cimport memset


def keep_places(const int[:, ::1] previous, int[:, ::1] slot_to_expert, int num_devices):
    """Rename the devices of ``slot_to_expert`` [L, S], and order their slots, so that few of ``previous`` change.

    Pairs of an old and a new device in falling order of the experts that they share.
    """
    cdef Py_ssize_t layer, layers = previous.shape[0]
    cdef int S = <int> previous.shape[1], D = num_devices
    cdef int *memory = <int *> malloc((D * D + 2 * D + 2 * S) * sizeof(int))
    if not memory:
        raise MemoryError("place_experts: no memory to work in")
    with nogil:
        for layer in range(layers):
            rename_devices(&previous[layer, 0], &slot_to_expert[layer, 0], S, D, memory)
    free(memory)


cdef int shared(const int *a, const int *b, int room, int *taken) noexcept nogil:
    """How many slots of both hold the same, each counted once; taken[j] is the slot of `a` that b[j] stands for, or -1."""
    cdef int i, j, n = 0
    for j in range(room):
        taken[j] = -1
    for i in range(room):
        for j in range(room):
            if taken[j] < 0 and a[i] == b[j]:
                taken[j] = i
                n += 1
                break
    return n


cdef void rename_devices(const int *old, int *new, int S, int D, int *memory) noexcept nogil:
    cdef int room = S // D, i, j, d, e, most, best_d = 0, best_e = 0
    cdef int *overlap = memory
    cdef int *named = overlap + D * D  # the old device of a new one
    cdef int *gone = named + D
    cdef int *taken = gone + D
    cdef int *answer = taken + S
    for d in range(D):
        named[d] = gone[d] = -1
        for e in range(D):
            overlap[d * D + e] = shared(old + d * room, new + e * room, room, taken)
    for i in range(D):
        most = -1
        for d in range(D):
            if gone[d] >= 0:
                continue
            for e in range(D):
                if named[e] < 0 and overlap[d * D + e] > most:
                    most, best_d, best_e = overlap[d * D + e], d, e
        gone[best_d] = best_e
        named[best_e] = best_d
    for d in range(D):
        e = gone[d]
        shared(old + d * room, new + e * room, room, taken)
        for i in range(room):
            answer[d * room + i] = -1
        for j in range(room):
            if taken[j] >= 0:
                answer[d * room + taken[j]] = new[e * room + j]
        i = 0
        for j in range(room):
            if taken[j] >= 0:
                continue
            while answer[d * room + i] >= 0:
                i += 1
            answer[d * room + i] = new[e * room + j]
    for i in range(S):
        new[i] = answer[i]


cdef struct Plan:
    # of one layer
    int num_experts, num_slots, num_devices, room
    const double *load  # [E]
    int *slots          # [S]
    int *count          # [E] replicas
    int *on             # [E, D] replicas on a device
    double *device      # [D] loads


cdef int weigh(Plan *p) noexcept nogil:
    """The loads of all devices; returns the heaviest."""
    cdef int d, i, heavy = 0
    for d in range(p.num_devices):
        p.device[d] = 0
        for i in range(d * p.room, (d + 1) * p.room):
            p.device[d] += p.load[p.slots[i]] / p.count[p.slots[i]]
        if p.device[d] > p.device[heavy]:
            heavy = d
    return heavy


cdef double after_change(Plan *p, int slot, int expert) noexcept nogil:
    """The largest load if the slot held the expert."""
    cdef int d, before = p.slots[slot], device = slot // p.room
    cdef double more = p.load[expert] / (p.count[expert] + 1), saved = p.load[expert] / p.count[expert] - more
    cdef double less = p.load[before] / p.count[before], added = p.load[before] / (p.count[before] - 1) - less
    cdef const int *of_expert = p.on + expert * p.num_devices
    cdef const int *of_before = p.on + before * p.num_devices
    cdef double found, top = 0
    for d in range(p.num_devices):
        found = p.device[d] - of_expert[d] * saved + of_before[d] * added
        if d == device:
            found += more - less - added
        if found > top:
            top = found
    return top


cdef int step(Plan *p, int left) noexcept nogil:
    """The best change of at most `left` slots, if one lowers the largest load; returns how many it changed."""
    cdef int heavy = weigh(p), i, j, d, at = -1, other = -1, kind = 0
    cdef double top = p.device[heavy], least = top * (1 - 1e-9), given, after
    for j in range(p.num_slots):
        d = j // p.room
        for i in range(heavy * p.room, (heavy + 1) * p.room):
            if left > 1 and d != heavy:  # exchanged
                given = p.load[p.slots[i]] / p.count[p.slots[i]] - p.load[p.slots[j]] / p.count[p.slots[j]]
                after = p.device[d] + given if p.device[d] + given > top - given else top - given
                if given > 0 and after < least:
                    least, at, other, kind = after, i, j, 2
            if p.count[p.slots[j]] > 1 and p.on[p.slots[i] * p.num_devices + d] == 0:  # one replica more
                after = after_change(p, j, p.slots[i])
                if after < least:
                    least, at, other, kind = after, i, j, 1
    if kind == 2:
        put(p, at, p.slots[other], p.slots[at])
        put(p, other, p.slots[at], p.slots[other])
        p.slots[at], p.slots[other] = p.slots[other], p.slots[at]
    elif kind == 1:
        p.count[p.slots[other]] -= 1
        p.count[p.slots[at]] += 1
        put(p, other, p.slots[at], p.slots[other])
        p.slots[other] = p.slots[at]
    return kind


cdef void put(Plan *p, int slot, int expert, int before) noexcept nogil:
    p.on[before * p.num_devices + slot // p.room] -= 1
    p.on[expert * p.num_devices + slot // p.room] += 1


def improve_within(const double[:, ::1] load, int[:, ::1] slot_to_expert, int num_devices, int max_moves):
    """Lower the heaviest device's load by changing at most ``max_moves`` slots a layer, in place."""
    cdef Py_ssize_t layer, layers = load.shape[0]
    cdef int i, left, moved
    cdef Plan p
    p.num_experts, p.num_slots, p.num_devices = <int> load.shape[1], <int> slot_to_expert.shape[1], num_devices
    p.room = p.num_slots // num_devices
    cdef size_t cells = <size_t> p.num_experts * num_devices
    p.device = <double *> malloc(num_devices * sizeof(double) + (cells + p.num_experts) * sizeof(int))
    if not p.device:
        raise MemoryError("place_experts: no memory to work in")
    p.on = <int *> (p.device + num_devices)
    p.count = p.on + cells
    with nogil:
        for layer in range(layers):
            p.load, p.slots = &load[layer, 0], &slot_to_expert[layer, 0]
            memset(p.on, 0, (cells + p.num_experts) * sizeof(int))
            for i in range(p.num_slots):
                p.count[p.slots[i]] += 1
                p.on[p.slots[i] * num_devices + i // p.room] += 1
            left = max_moves
            while left > 0:
                moved = step(&p, left)
                if moved == 0:
                    break
                left -= moved
    free(p.device)
