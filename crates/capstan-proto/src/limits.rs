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
/// Largest header of a micro-batch frame: [`ROWS_MAX`] rows of at most 11 bytes, [`KV_OPS_MAX`] operations of 16 and
/// [`LAYERS_MAX`] stage times of 5, with room to spare.
pub const DATA_HEADER_BYTES_MAX: usize = 128 << 10;
/// Most micro-batches under way in a pipeline, and so most steps of one drop notice: two for each of the most stages
/// there can be. Engines send about one more than there are stages.
pub const IN_FLIGHT_MAX: usize = 2 * LAYERS_MAX as usize;
/// Largest drop notice: [`IN_FLIGHT_MAX`] steps of at most 10 bytes, with the epoch.
pub const NOTICE_BYTES_MAX: usize = 32 << 10;
/// Most KV operations that one micro-batch carries: a few for each of [`SLOTS_MAX`] slots.
pub const KV_OPS_MAX: usize = 1024;
/// Most slots of a deployment, snapshots of guesses included: llama.cpp's own bound on sequences is 256.
pub const SLOTS_MAX: u32 = 256;
/// Most layers of a model and so most stages of a placement.
pub const LAYERS_MAX: u32 = 1024;
/// Most guessed tokens of a sequence that are under way: beyond this even a perfect guesser gains nothing.
pub const SPECULATION_DEPTH_MAX: u16 = 16;
/// Least and most that a decode step may be slowed down by prompts that come in, in percent of its own time: at 100
/// prompts wait for every answer to end, beyond 1000 nobody calls it streaming.
pub const DECODE_SLOWDOWN_PERCENT_MIN: u16 = 100;
/// See [`DECODE_SLOWDOWN_PERCENT_MIN`].
pub const DECODE_SLOWDOWN_PERCENT_MAX: u16 = 1000;
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
/// Most bytes that attention's scores may take on a processor. There they are written out, for llama.cpp's fused kernel
/// (flash attention), which needs no room for them, is several times slower on processors: one core decodes
/// Qwen2.5-Coder-0.5B behind 2048 tokens at 13.6 tokens/s with scores and at 5.2 without. Long contexts of wide models
/// would take gigabytes; they get the fused kernel.
pub const SCORES_BYTES_MAX: u64 = 512 << 20;

/// Bytes of attention's scores (f32) for a micro-batch of `rows` rows that may each read `cells` rows of the KV cache,
/// with `heads` heads.
/// None where that is too much for them to be written out.
pub fn scores_bytes(rows: u32, cells: u32, heads: u32) -> Option<u64> {
    let scores = (u64::from(rows) * u64::from(cells)).saturating_mul(u64::from(heads));
    Some(scores.saturating_mul(size_of::<f32>() as u64)).filter(|bytes| *bytes <= SCORES_BYTES_MAX)
}
