# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True
"""Experts to the slots of devices, layer by layer: replicas, packing, improvement by exchange, search where it is small.

replicate   one slot for every expert, then each further slot to the expert with the most load per replica (which is what
            makes the largest share as small as it can be)
pack        shares in falling order to the device with the least load that has a slot free (Graham's LPT rule)
improve     exchange two slots while that lowers the load of the heaviest device
search      every number of replicas and every packing, where there are at most ``SMALL`` slots
"""

from libc.stdlib cimport free, malloc, qsort

cdef enum:
    SMALL = 10

cdef double NEGLIGIBLE = 1e-3


cdef struct Share:
    double weight
    int expert


cdef int heavier(const void *a, const void *b) noexcept nogil:
    """Falling weight; equal weights by expert, so that every machine sorts alike."""
    cdef const Share *x = <const Share *> a
    cdef const Share *y = <const Share *> b
    if x.weight != y.weight:
        return -1 if x.weight > y.weight else 1
    return (x.expert > y.expert) - (x.expert < y.expert)


cdef struct Work:
    # of one layer, or of one node of it: E experts, S slots, D devices with S / D slots each
    int num_experts, num_slots, num_devices, room
    const double *load     # [E]
    int *count             # [E] replicas
    Share *shares          # [S]
    double *device_load    # [D]
    int *used              # [D] slots taken
    int *slots             # [S] device by device: place of a share in `shares`
    int *best              # [S] expert by slot, the answer
    double best_load
    int *trial             # [S] of the search


cdef void replicate(Work *w) noexcept nogil:
    cdef int e, s, chosen
    for e in range(w.num_experts):
        w.count[e] = 1
    for s in range(w.num_slots - w.num_experts):
        chosen = 0
        for e in range(1, w.num_experts):  # w.load[e] / w.count[e] > w.load[chosen] / w.count[chosen]
            if w.load[e] * w.count[chosen] > w.load[chosen] * w.count[e]:
                chosen = e
        w.count[chosen] += 1


cdef void share_out(Work *w) noexcept nogil:
    """The shares of all replicas, in falling order."""
    cdef int e, r, s = 0
    for e in range(w.num_experts):
        for r in range(w.count[e]):
            w.shares[s].weight = w.load[e] / w.count[e]
            w.shares[s].expert = e
            s += 1
    qsort(w.shares, w.num_slots, sizeof(Share), heavier)


cdef bint holds(Work *w, int device, int expert, int but) noexcept nogil:
    """Whether the device has a slot of the expert other than slot number `but` of all."""
    cdef int i
    for i in range(device * w.room, device * w.room + w.used[device]):
        if i != but and w.shares[w.slots[i]].expert == expert:
            return True
    return False


cdef void pack(Work *w, bint apart) noexcept nogil:
    """`apart`: no two replicas of an expert on a device, as long as another one has a slot free."""
    cdef int d, s, chosen, lightest
    for d in range(w.num_devices):
        w.device_load[d] = 0
        w.used[d] = 0
    for s in range(w.num_slots):
        chosen = lightest = -1
        for d in range(w.num_devices):
            if w.used[d] == w.room:
                continue
            if lightest < 0 or w.device_load[d] < w.device_load[lightest]:
                lightest = d
            if apart and (chosen < 0 or w.device_load[d] < w.device_load[chosen]):
                if w.count[w.shares[s].expert] == 1 or not holds(w, d, w.shares[s].expert, -1):
                    chosen = d
        if chosen < 0:
            chosen = lightest
        w.slots[chosen * w.room + w.used[chosen]] = s
        w.used[chosen] += 1
        w.device_load[chosen] += w.shares[s].weight


cdef double largest(Work *w, int *device) noexcept nogil:
    cdef int d
    device[0] = 0
    for d in range(1, w.num_devices):
        if w.device_load[d] > w.device_load[device[0]]:
            device[0] = d
    return w.device_load[device[0]]


cdef bint exchange(Work *w) noexcept nogil:
    """The exchange with the heaviest device that lowers the larger load of the two the most."""
    cdef int heavy, d, i, j, best_i = -1, best_j = -1, best_d = -1
    cdef double top = largest(w, &heavy), least = top, given, after
    for i in range(heavy * w.room, (heavy + 1) * w.room):
        for d in range(w.num_devices):
            if d == heavy or w.device_load[d] >= least:
                continue
            for j in range(d * w.room, (d + 1) * w.room):
                given = w.shares[w.slots[i]].weight - w.shares[w.slots[j]].weight
                if given <= 0:
                    continue
                after = w.device_load[d] + given
                if top - given > after:
                    after = top - given
                if after < least * (1 - 1e-12) and not (
                    holds(w, d, w.shares[w.slots[i]].expert, j) or holds(w, heavy, w.shares[w.slots[j]].expert, i)
                ):
                    least, best_i, best_j, best_d = after, i, j, d
    if best_i < 0:
        return False
    given = w.shares[w.slots[best_i]].weight - w.shares[w.slots[best_j]].weight
    w.device_load[heavy] -= given
    w.device_load[best_d] += given
    w.slots[best_i], w.slots[best_j] = w.slots[best_j], w.slots[best_i]
    return True


cdef void keep_if_better(Work *w) noexcept nogil:
    cdef int heavy, s
    cdef double top = largest(w, &heavy)
    if top < w.best_load:
        w.best_load = top
        for s in range(w.num_slots):
            w.best[s] = w.shares[w.slots[s]].expert


cdef void improve(Work *w) noexcept nogil:
    """Until no exchange helps, or what is left to win is less than loads change from one step to the next."""
    cdef int d, heavy, round
    cdef double least = w.shares[0].weight, mean = 0
    for d in range(w.num_devices):
        mean += w.device_load[d] / w.num_devices
    if mean > least:
        least = mean
    for round in range(4 * w.num_devices):
        if largest(w, &heavy) <= least * (1 + NEGLIGIBLE) or not exchange(w):
            return


cdef void search_packings(Work *w, int s) noexcept nogil:
    """Share `s` to every device that may take it; equal devices are tried once."""
    cdef int d, other, i
    cdef bint same
    if s == w.num_slots:
        keep_trial(w)
        return
    for d in range(w.num_devices):
        if w.used[d] == w.room or w.device_load[d] + w.shares[s].weight >= w.best_load * (1 - 1e-12):
            continue
        same = False
        for other in range(d):
            same = same or (w.used[other] == w.used[d] and w.device_load[other] == w.device_load[d])
        if same:
            continue
        w.trial[s] = d
        w.used[d] += 1
        w.device_load[d] += w.shares[s].weight
        search_packings(w, s + 1)
        w.used[d] -= 1
        w.device_load[d] -= w.shares[s].weight


cdef void keep_trial(Work *w) noexcept nogil:
    cdef int d, s, at
    cdef double top = 0
    for d in range(w.num_devices):
        if w.device_load[d] > top:
            top = w.device_load[d]
    if top >= w.best_load:
        return
    w.best_load = top
    at = 0
    for d in range(w.num_devices):
        for s in range(w.num_slots):
            if w.trial[s] == d:
                w.best[at] = w.shares[s].expert
                at += 1


cdef void search_replicas(Work *w, int expert, int left) noexcept nogil:
    """`left` further replicas for the experts from this one on."""
    cdef int more, d
    if expert == w.num_experts - 1:
        w.count[expert] = 1 + left
        share_out(w)
        for d in range(w.num_devices):
            w.used[d] = 0
            w.device_load[d] = 0
        search_packings(w, 0)
        return
    for more in range(left + 1):
        w.count[expert] = 1 + more
        search_replicas(w, expert + 1, left - more)


cdef void solve(Work *w) noexcept nogil:
    w.best_load = 1e308
    replicate(w)
    share_out(w)
    pack(w, False)
    keep_if_better(w)
    pack(w, True)
    improve(w)
    keep_if_better(w)
    if w.num_slots <= SMALL:
        search_replicas(w, 0, w.num_slots - w.num_experts)


cdef class _Memory:
    """The arrays of a Work, for at most so many experts, slots and devices."""
    cdef Work work
    cdef void *block

    def __cinit__(self, int num_experts, int num_slots, int num_devices):
        cdef size_t S = num_slots, D = num_devices, E = num_experts
        self.block = malloc(S * sizeof(Share) + (D + E) * sizeof(double) + (E + D + 3 * S) * sizeof(int) + 64)
        if not self.block:
            raise MemoryError("place_experts: no memory to work in")
        self.work.shares = <Share *> self.block
        self.work.device_load = <double *> (self.work.shares + S)
        self.work.count = <int *> (self.work.device_load + D + E)
        self.work.used = self.work.count + E
        self.work.slots = self.work.used + D
        self.work.best = self.work.slots + S
        self.work.trial = self.work.best + S

    def __dealloc__(self):
        free(self.block)

    cdef void shape(self, int num_experts, int num_slots, int num_devices) noexcept:
        self.work.num_experts, self.work.num_slots, self.work.num_devices = num_experts, num_slots, num_devices
        self.work.room = num_slots // num_devices


def place(const double[:, ::1] load, int num_devices, int[:, ::1] slot_to_expert):
    """Fill ``slot_to_expert`` [L, S] for loads [L, E]; slots of device d are d * S / D and the following."""
    cdef Py_ssize_t layer, layers = load.shape[0]
    cdef int s, S = <int> slot_to_expert.shape[1]
    cdef _Memory memory = _Memory(<int> load.shape[1], S, num_devices)
    memory.shape(<int> load.shape[1], S, num_devices)
    cdef Work *w = &memory.work
    with nogil:
        for layer in range(layers):
            w.load = &load[layer, 0]
            solve(w)
            for s in range(S):
                slot_to_expert[layer, s] = w.best[s]


def groups_to_nodes(const double[:, ::1] load, int num_nodes, int[:, ::1] node_groups):
    """Fill ``node_groups`` [L, G] for the groups' loads [L, G]: the groups of node n are G / N from n * G / N on."""
    cdef Py_ssize_t layer, layers = load.shape[0]
    cdef int g, G = <int> load.shape[1]
    cdef _Memory memory = _Memory(G, G, num_nodes)
    memory.shape(G, G, num_nodes)
    cdef Work *w = &memory.work
    with nogil:
        for layer in range(layers):
            w.load = &load[layer, 0]
            solve(w)
            for g in range(G):
                node_groups[layer, g] = w.best[g]
