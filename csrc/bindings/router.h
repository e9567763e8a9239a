// A RouterConfig as the kernels read it, from the tuple that pyroute._gating_contract.core_router makes.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include <pybind11/pybind11.h>

#include "gating.h"

namespace pyroute {

inline Score score_of(const std::string &name) {
    if (name == "softmax")
        return Score::softmax;
    if (name == "sigmoid")
        return Score::sigmoid;
    if (name == "sqrtsoftplus")
        return Score::sqrtsoftplus;
    throw std::invalid_argument("score must be softmax, sigmoid or sqrtsoftplus");
}

inline Renormalize renormalize_of(const std::string &name) {
    if (name == "none")
        return Renormalize::none;
    if (name == "sum")
        return Renormalize::sum;
    if (name == "clamp")
        return Renormalize::clamp;
    throw std::invalid_argument("renormalize must be none, sum or clamp");
}

// Kernels rely on what is checked here.
inline Router parsed_router(const pybind11::tuple &fields) {
    if (fields.size() != 10)
        throw std::invalid_argument("router must have 10 fields");
    Router r;
    r.num_experts = fields[0].cast<int64_t>();
    r.top_k = fields[1].cast<int64_t>();
    r.num_groups = fields[2].cast<int64_t>();
    r.topk_groups = fields[3].cast<int64_t>();
    r.group_topn = fields[4].cast<int64_t>();
    r.score = score_of(fields[5].cast<std::string>());
    r.post = fields[6].cast<bool>();
    r.renormalize = renormalize_of(fields[7].cast<std::string>());
    r.renormalize_eps = fields[8].cast<double>();
    r.scaling_factor = fields[9].cast<double>();
    const bool counts = r.num_experts >= 1 && r.num_experts <= INT32_MAX && r.top_k >= 1 && r.top_k <= r.num_experts &&
                        r.num_groups >= 1 && r.topk_groups >= 1 && r.topk_groups <= r.num_groups &&
                        r.num_experts % r.num_groups == 0;
    if (!counts)
        throw std::invalid_argument("router has impossible sizes");
    const int64_t size = r.num_experts / r.num_groups;
    if (r.topk_groups * size < r.top_k || r.group_topn < 1 || r.group_topn > size)
        throw std::invalid_argument("router has groups that are too small");
    return r;
}

// Of the tuple that this thread saw last, which a config keeps as long as it lives, the router is still here.
inline Router router_of(const pybind11::tuple &fields) {
    thread_local PyObject *last = nullptr; // owned, so that no other tuple can come to its address
    thread_local Router router;
    if (fields.ptr() != last) {
        const Router parsed = parsed_router(fields);
        Py_INCREF(fields.ptr());
        Py_XDECREF(std::exchange(last, fields.ptr()));
        router = parsed;
    }
    return router;
}

} // namespace pyroute
