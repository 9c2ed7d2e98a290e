//! Whether a copy of the KV cache would bring a lost sequence back sooner than computing it again: both, on one core, for
//! histories of some lengths. Prints a Markdown table.
use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use capstan_engine::StageOutput;
use capstan_llama::{Context, ContextOptions, Model, ModelOptions};
use capstan_proto::Epoch;
use capstan_proto::data::{KvOp, MicroBatch, Payload, Row};
use clap::Parser;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Rows of a chunk of a prompt.
const CHUNK: u32 = 512;
/// Tries of which the shortest counts.
const TRIES: u32 = 3;

/// A copy of the KV cache beside computing it again
#[derive(Parser)]
struct Args {
    /// The GGUF
    #[arg(long)]
    model: PathBuf,
    /// Tokens of the history
    #[arg(long, value_delimiter = ',', default_values_t = [128, 512, 2048])]
    tokens: Vec<u32>,
    /// Compute threads
    #[arg(long, default_value_t = 1)]
    threads: u32,
    /// Where the copies go, best in memory
    #[arg(long, default_value = "/dev/shm")]
    folder: PathBuf,
}

/// Computes tokens `from..to` of slot 0 in chunks of so many rows, and gives the logits of the last one.
fn compute(context: &mut Context, from: u32, to: u32, chunk: u32) -> Outcome<Vec<f32>> {
    let mut logits = Vec::new();
    let (mut at, mut ops) = (from, vec![KvOp::Trim { slot: 0, from }]);
    while at < to {
        let end = (at + chunk).min(to);
        let rows = (at..end).map(|pos| Row { slot: 0, pos, output: pos + 1 == to }).collect();
        // Any text will do: no time depends on it.
        let tokens = (at..end).map(|pos| 1000 + (pos * 7919) as i32 % 20_000).collect();
        let ops = std::mem::take(&mut ops);
        let batch = MicroBatch { epoch: Epoch(0), step: 0, ops, rows, payload: Payload::Tokens(tokens) };
        if let StageOutput::Logits(l) = context.decode(&batch)? {
            logits = l;
        }
        at = end;
    }
    Ok(logits)
}

/// The shortest time of some tries, and what the last one gave.
fn shortest<T>(mut try_it: impl FnMut() -> Outcome<T>) -> Outcome<(Duration, T)> {
    let mut best: Option<(Duration, T)> = None;
    for _ in 0..TRIES {
        let began = Instant::now();
        let given = try_it()?;
        let took = began.elapsed();
        best = Some((best.map_or(took, |(least, _)| least.min(took)), given));
    }
    best.ok_or_else(|| "nothing was tried".into())
}

fn main() -> Outcome<()> {
    let args = Args::parse();
    let model = Model::load(&args.model, ModelOptions::default())?;
    let ctx = args.tokens.iter().max().copied().unwrap_or(CHUNK) + 1;
    let options = ContextOptions {
        ctx_per_slot: ctx,
        slots: 1,
        ubatch: CHUNK,
        threads: Some(args.threads),
        ..ContextOptions::default()
    };
    let mut context = Context::new(model.clone(), &options)?;
    println!(
        "| tokens | computed in chunks of {CHUNK} | one by one | a token more | bytes of a copy | to copy it | to put it back |"
    );
    println!("|---:|---:|---:|---:|---:|---:|---:|");
    let file = args.folder.join(format!("capstan-snapshot-{}", std::process::id()));
    let measured = args.tokens.iter().try_for_each(|n| measure(&mut context, *n, &file));
    std::fs::remove_file(&file)?;
    measured
}

fn measure(context: &mut Context, n: u32, file: &Path) -> Outcome<()> {
    let ms = |d: Duration| format!("{:.1} ms", d.as_secs_f64() * 1e3);
    let (alone, _) = shortest(|| compute(context, 0, n, 1))?;
    let (chunks, _) = shortest(|| compute(context, 0, n, CHUNK))?;
    let (copy, bytes) = shortest(|| Ok(context.save(0, file)?))?;
    let (token, wanted) = shortest(|| compute(context, n, n + 1, 1))?;
    let (back, ()) = shortest(|| {
        context.clear();
        Ok(context.restore(0, file, n)?)
    })?;
    let again = compute(context, n, n + 1, 1)?;
    if again.iter().map(|l| l.to_bits()).ne(wanted.iter().map(|l| l.to_bits())) {
        return Err("what was put back is not what was copied".into());
    }
    println!("| {n} | {} | {} | {} | {} | {} | {} |", ms(chunks), ms(alone), ms(token), bytes, ms(copy), ms(back));
    Ok(())
}
