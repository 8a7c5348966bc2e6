// Streams and events. Work waits until somebody waits for it, so that whoever forgets to wait sees old values.
#include "emulator.h"

#include <algorithm>
#include <chrono>

namespace emulated {

Stream* stream_of(void* handle) {
    State& s = state();
    // 1 and 2 name the default streams; this emulation knows one.
    if (reinterpret_cast<uintptr_t>(handle) <= 2) return &s.default_stream;
    return find<Stream>(handle, Tag::stream);
}

static std::vector<Stream*> streams() {
    std::vector<Stream*> found = {&state().default_stream};
    for (const auto& [handle, tag] : state().objects)
        if (tag == Tag::stream) found.push_back(static_cast<Stream*>(const_cast<void*>(handle)));
    return found;
}

bool unsafe_now() {
    bool unsafe = false;
    for (Stream* stream : streams())
        if (stream->capture && (stream->capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL ||
                                (stream->capture->mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL &&
                                 stream->capture->thread == std::this_thread::get_id())))
            stream->capture->invalid = unsafe = true;
    return unsafe;
}

CUresult run_until(Stream* stream, uint64_t position) {
    State& s = state();
    while (stream->done < position && !stream->queue.empty()) {
        auto work = std::move(stream->queue.front());
        stream->queue.pop_front();
        ++stream->done;
        if (s.lost) continue;
        if (CUresult error = work()) s.lost = error;
    }
    return s.lost;
}

CUresult run_stream(Stream* stream) { return run_until(stream, stream->enqueued); }

CUresult run_everything() {
    auto all = streams();
    std::shuffle(all.begin(), all.end(), state().random);
    for (Stream* stream : all) run_stream(stream);
    return state().lost;
}

CUresult enqueue(Stream* stream, std::function<CUresult()> work) {
    State& s = state();
    // The default stream waits for the blocking ones, and they for it.
    std::vector<std::pair<Stream*, uint64_t>> before;
    if (stream == &s.default_stream) {
        for (Stream* other : streams()) {
            if (other == stream || !other->blocking) continue;
            if (other->capture) {
                other->capture->invalid = true;
                return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
            }
            before.emplace_back(other, other->enqueued);
        }
    } else if (stream->blocking) {
        before.emplace_back(&s.default_stream, s.default_stream.enqueued);
    }
    ++stream->enqueued;
    stream->queue.push_back([before, work]() -> CUresult {
        for (const auto& [other, position] : before)
            if (CUresult error = run_until(other, position)) return error;
        return work();
    });
    return CUDA_SUCCESS;
}

CUresult submit(Stream* stream, std::unique_ptr<Node> node) {
    if (Capture* capture = stream->capture.get()) {
        if (capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        node->graph = capture->graph;
        node->after = stream->last;
        stream->last = {node.get()};
        capture->graph->nodes.push_back(std::move(node));
        return CUDA_SUCCESS;
    }
    std::shared_ptr<Node> kept = std::move(node);
    return enqueue(stream, [kept] { return run_node(*kept); });
}

static double now_ms() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Whether what a caller asked about is done; work goes on once it was asked about.
static CUresult ready(Stream* stream, uint64_t position) {
    if (stream->done >= position) return state().lost;
    const CUresult error = run_until(stream, position);
    return error ? error : CUDA_ERROR_NOT_READY;
}

static CUresult end_of(Capture& capture) {
    Stream* origin = capture.origin;
    std::set<Node*> reached(origin->last.begin(), origin->last.end());
    std::vector<Node*> left(origin->last);
    while (!left.empty()) {
        Node* node = left.back();
        left.pop_back();
        for (Node* before : node->after)
            if (reached.insert(before).second) left.push_back(before);
    }
    capture.ended = true;
    CUresult result = capture.invalid ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
    for (Stream* stream : capture.streams) {
        for (Node* node : stream->last)
            if (!result && !reached.count(node)) result = CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
        stream->last.clear();
        if (stream != origin) stream->capture.reset();
    }
    return result;
}

}  // namespace emulated

using namespace emulated;

#define STREAM(name, handle)                   \
    Stream* name = stream_of(handle);          \
    if (!name) return violation(CUDA_ERROR_INVALID_HANDLE, "a stream is used that is none")
#define EVENT(name, handle)                                 \
    Event* name = find<Event>(handle, Tag::event);          \
    if (!name) return violation(CUDA_ERROR_INVALID_HANDLE, "an event is used that is none")

extern "C" {

CUresult cuStreamCreate(void** handle, unsigned int flags) {
    EMULATED_CALL("cuStreamCreate");
    if (flags > CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
    Stream* stream = new Stream;
    stream->blocking = flags != CU_STREAM_NON_BLOCKING;
    state().objects.emplace(stream, Tag::stream);
    *handle = stream;
    return CUDA_SUCCESS;
}

CUresult cuStreamCreateWithPriority(void** handle, unsigned int flags, int) { return cuStreamCreate(handle, flags); }

CUresult cuStreamDestroy_v2(void* handle) {
    EMULATED_CALL("cuStreamDestroy");
    STREAM(stream, handle);
    if (stream == &state().default_stream) return CUDA_ERROR_INVALID_VALUE;
    if (stream->capture) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    const CUresult error = run_stream(stream);  // its work is still done
    for (const auto& [object, tag] : state().objects)
        if (tag == Tag::event) {
            Event* event = static_cast<Event*>(const_cast<void*>(object));
            if (event->stream == stream) event->stream = nullptr;
        }
    delete stream;
    return error;
}

CUresult cuStreamSynchronize(void* handle) {
    EMULATED_CALL("cuStreamSynchronize");
    STREAM(stream, handle);
    ++state().counts["host_syncs"];
    if (stream->capture) {
        stream->capture->invalid = true;
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    return run_stream(stream);
}

CUresult cuStreamQuery(void* handle) {
    EMULATED_CALL("cuStreamQuery");
    STREAM(stream, handle);
    if (stream->capture) {
        stream->capture->invalid = true;
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    return ready(stream, stream->enqueued);
}

CUresult cuStreamBeginCapture_v2(void* handle, int mode) {
    EMULATED_CALL("cuStreamBeginCapture");
    STREAM(stream, handle);
    if (stream == &state().default_stream) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (stream->capture || mode < 0 || mode > CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
    auto capture = std::make_shared<Capture>();
    capture->owned = std::make_unique<Graph>();
    capture->graph = capture->owned.get();
    capture->origin = stream;
    capture->mode = mode;
    capture->thread = std::this_thread::get_id();
    capture->number = state().next_number++;
    capture->streams = {stream};
    stream->capture = std::move(capture);
    return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(void* handle, void** graph) {
    EMULATED_CALL("cuStreamEndCapture");
    STREAM(stream, handle);
    *graph = nullptr;
    if (!stream->capture) return CUDA_ERROR_INVALID_VALUE;
    if (stream->capture->origin != stream) return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
    if (stream->capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED &&
        stream->capture->thread != std::this_thread::get_id())
        return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    const std::shared_ptr<Capture> capture = std::move(stream->capture);
    stream->capture.reset();
    if (CUresult error = end_of(*capture)) return error;
    *graph = capture->owned.release();
    return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(void* handle, int* status) {
    EMULATED_CALL("cuStreamIsCapturing");
    STREAM(stream, handle);
    *status = !stream->capture ? CU_STREAM_CAPTURE_STATUS_NONE
            : stream->capture->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                       : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    return CUDA_SUCCESS;
}

CUresult cuEventCreate(void** handle, unsigned int flags) {
    EMULATED_CALL("cuEventCreate");
    Event* event = new Event;
    event->timed = !(flags & CU_EVENT_DISABLE_TIMING);
    *handle = event;
    return CUDA_SUCCESS;
}

CUresult cuEventDestroy_v2(void* handle) {
    EMULATED_CALL("cuEventDestroy");
    EVENT(event, handle);
    if (event->stream) run_until(event->stream, event->position);
    delete event;
    return CUDA_SUCCESS;
}

CUresult cuEventRecord(void* event_handle, void* stream_handle) {
    EMULATED_CALL("cuEventRecord");
    STREAM(stream, stream_handle);
    EVENT(event, event_handle);
    if (stream->capture) {
        event->capture = stream->capture;
        event->after = stream->last;
        return CUDA_SUCCESS;
    }
    if (event->stream) run_until(event->stream, event->position);
    event->capture.reset();
    event->recorded = true;
    event->happened = false;
    enqueue(stream, [event] {
        event->happened = true;
        event->milliseconds = now_ms();
        return CUDA_SUCCESS;
    });
    event->stream = stream;
    event->position = stream->enqueued;
    return CUDA_SUCCESS;
}

CUresult cuStreamWaitEvent(void* stream_handle, void* event_handle, unsigned int) {
    EMULATED_CALL("cuStreamWaitEvent");
    STREAM(stream, stream_handle);
    EVENT(event, event_handle);
    if (event->capture) {
        if (event->capture->ended) return CUDA_ERROR_CAPTURED_EVENT;
        if (event->capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        if (stream->capture && stream->capture != event->capture) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        stream->capture = event->capture;
        stream->capture->streams.insert(stream);
        for (Node* node : event->after)
            if (std::find(stream->last.begin(), stream->last.end(), node) == stream->last.end())
                stream->last.push_back(node);
        return CUDA_SUCCESS;
    }
    if (stream->capture) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;  // the event lies outside of the capture
    if (!event->recorded || !event->stream || event->stream == stream) return CUDA_SUCCESS;
    Stream* other = event->stream;
    const uint64_t position = event->position;
    return enqueue(stream, [other, position] {
        return find<Stream>(other, Tag::stream) || other == &state().default_stream ? run_until(other, position)
                                                                                   : CUDA_SUCCESS;
    });
}

CUresult cuEventSynchronize(void* handle) {
    EMULATED_CALL("cuEventSynchronize");
    EVENT(event, handle);
    ++state().counts["host_syncs"];
    if (event->capture) return CUDA_ERROR_CAPTURED_EVENT;
    return event->recorded && event->stream ? run_until(event->stream, event->position) : state().lost;
}

CUresult cuEventQuery(void* handle) {
    EMULATED_CALL("cuEventQuery");
    EVENT(event, handle);
    if (event->capture) return CUDA_ERROR_CAPTURED_EVENT;
    return event->recorded && event->stream ? ready(event->stream, event->position) : state().lost;
}

CUresult cuEventElapsedTime_v2(float* milliseconds, void* begin_handle, void* end_handle) {
    EMULATED_CALL("cuEventElapsedTime");
    EVENT(begin, begin_handle);
    EVENT(end, end_handle);
    if (!begin->timed || !end->timed || !begin->recorded || !end->recorded) return CUDA_ERROR_INVALID_HANDLE;
    if (!begin->happened || !end->happened) return CUDA_ERROR_NOT_READY;
    *milliseconds = static_cast<float>(end->milliseconds - begin->milliseconds);
    return CUDA_SUCCESS;
}

}  // extern "C"
