//! Bounds on everything that another process or machine may send, each with its reason.

/// Largest control or child message. The biggest honest one is a prompt of [`PROMPT_BYTES_MAX`], with its envelope.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Largest HTTP body and prompt: four bytes a token for a context of two million tokens.
pub const PROMPT_BYTES_MAX: usize = 8 << 20;
/// Most rows of one micro-batch; llama.cpp's physical batches rarely exceed 2048.
pub const ROWS_MAX: usize = 4096;
/// Widest hidden state in floats per row: four streams of 16,384, twice the widest model known.
pub const HIDDEN_WIDTH_MAX: usize = 1 << 17;
/// Largest micro-batch frame in bytes: 512 MiB, a 4096-row chunk of a 32,768-wide model in f32.
pub const DATA_BYTES_MAX: usize = 512 << 20;
/// Most KV operations that one micro-batch carries: a few for each of [`SLOTS_MAX`] slots.
pub const KV_OPS_MAX: usize = 1024;
/// Most slots of a deployment: llama.cpp's own bound on sequences is 256.
pub const SLOTS_MAX: u32 = 256;
/// Most layers of a model and so most stages of a placement.
pub const LAYERS_MAX: u32 = 1024;
/// Requests that wait for a slot before the API answers 429.
pub const QUEUE_MAX: usize = 64;
/// Micro-batches a stage may hold between the network and its compute thread: two in each direction overlap
/// receiving, computing and sending; more would only add latency.
pub const STAGE_QUEUE: usize = 2;
/// Most stop strings of a request, and the longest of them in bytes.
pub const STOPS_MAX: usize = 16;
/// See [`STOPS_MAX`].
pub const STOP_BYTES_MAX: usize = 256;
/// Most members of a cluster.
pub const MEMBERS_MAX: usize = 256;
/// Longest name of a node or a model, in bytes.
pub const NAME_BYTES_MAX: usize = 128;
/// Events of one request that wait for a slow client before its generation is held up.
pub const EVENT_QUEUE: usize = 256;
