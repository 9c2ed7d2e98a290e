//! A token from logits: llama.cpp's sampler chain, in the order of its own tools.
use std::ptr::NonNull;

use capstan_proto::generate::Sampling;
use llama_cpp_sys_2 as sys;

use crate::backend::init;
use crate::{LlamaError, Vocab};

/// Below this temperature the likeliest token is taken; dividing by less would overflow.
const TEMPERATURE_MIN: f32 = 1e-6;
/// Longest history the penalties look at: their ring is allocated whole, and contexts are not longer.
const REPEAT_LAST_N_MAX: u32 = 1 << 20;
/// Stands for an infinite bias upwards, which would make the softmax undefined.
const BIAS_MAX: f32 = 1e30;
/// llama.cpp takes the largest number as "draw a seed"; a caller who wants exactly that one gets its neighbour.
const SEED_MAX: u32 = SEED_RANDOM - 1;
/// llama.cpp's `LLAMA_DEFAULT_SEED`, a macro that the bindings leave out.
const SEED_RANDOM: u32 = u32::MAX;

/// A request's sampling rules, with the random state and the recent tokens they need.
pub struct Sampler {
    chain: NonNull<sys::llama_sampler>,
    n_vocab: usize,
    /// How many of a prompt's last tokens matter to the penalties.
    history: usize,
    /// Nothing moves the logits and the likeliest is taken: the chain would only repeat what one look finds.
    plain_greedy: bool,
    candidates: Vec<sys::llama_token_data>,
}

// SAFETY: a sampler chain is plain memory that no thread is tied to; `&mut self` gives one thread at a time.
unsafe impl Send for Sampler {}

impl Sampler {
    /// The chain: bias, penalties, top-k, top-p, min-p, temperature, draw. At temperature 0 the likeliest token after
    /// bias and penalties is taken, the first of equals.
    ///
    /// Refuses a bias of a token that does not exist and numbers that are none.
    pub fn new(sampling: &Sampling, vocab: &Vocab) -> Result<Self, LlamaError> {
        Self::with_vocab_size(sampling, vocab.n_tokens())
    }

    /// As [`Sampler::new`], for a vocabulary of so many tokens.
    pub fn with_vocab_size(sampling: &Sampling, n_vocab: usize) -> Result<Self, LlamaError> {
        init();
        let s = sampling;
        let bad = |m: String| Err(LlamaError::Sampling(m));
        let numbers = [s.temperature, s.top_p, s.min_p, s.repeat_penalty, s.frequency_penalty, s.presence_penalty];
        if numbers.iter().any(|x| !x.is_finite()) || s.repeat_penalty <= 0.0 {
            return bad("a sampling setting is not a usable number".into());
        }
        let Ok(n) = i32::try_from(n_vocab) else {
            return bad(format!("the vocabulary has {n_vocab} tokens, which is too many"));
        };
        let mut biases = Vec::with_capacity(s.logit_bias.len());
        for &(token, bias) in &s.logit_bias {
            if !(0..n).contains(&token) || bias.is_nan() {
                return bad(format!("logit_bias names token {token}; the model has tokens 0 to {}", n - 1));
            }
            biases.push(sys::llama_logit_bias { token, bias: bias.min(BIAS_MAX) });
        }
        let last_n = s.repeat_last_n.min(REPEAT_LAST_N_MAX);
        let penalties_on =
            last_n > 0 && (s.repeat_penalty != 1.0 || s.frequency_penalty != 0.0 || s.presence_penalty != 0.0);

        // SAFETY: constants of the library, then a new chain, which copies them.
        let chain = unsafe { sys::llama_sampler_chain_init(sys::llama_sampler_chain_default_params()) };
        let Some(chain) = NonNull::new(chain) else { return bad("memory ran out".into()) };
        let history = if penalties_on { last_n as usize } else { 0 };
        let greedy = s.temperature < TEMPERATURE_MIN;
        let plain_greedy = greedy && biases.is_empty() && !penalties_on;
        let sampler = Self { chain, n_vocab, history, plain_greedy, candidates: Vec::new() };
        // SAFETY: each call makes a new sampler from plain numbers (the biases are copied), whose ownership
        // `push` hands to the chain.
        unsafe {
            if !biases.is_empty() {
                sampler.push(sys::llama_sampler_init_logit_bias(n, biases.len() as i32, biases.as_ptr()));
            }
            if penalties_on {
                let (f, p) = (s.frequency_penalty, s.presence_penalty);
                sampler.push(sys::llama_sampler_init_penalties(n, last_n as i32, s.repeat_penalty, f, p));
            }
            if greedy {
                sampler.push(sys::llama_sampler_init_greedy());
                return Ok(sampler);
            }
            if s.top_k > 0 {
                sampler.push(sys::llama_sampler_init_top_k(s.top_k.min(n as u32) as i32));
            }
            if s.top_p < 1.0 {
                sampler.push(sys::llama_sampler_init_top_p(s.top_p.max(0.0), 1));
            }
            if s.min_p > 0.0 {
                sampler.push(sys::llama_sampler_init_min_p(s.min_p, 1));
            }
            sampler.push(sys::llama_sampler_init_temp(s.temperature));
            let seed = s.seed.map_or(SEED_RANDOM, |seed| seed.min(SEED_MAX));
            sampler.push(sys::llama_sampler_init_dist(seed));
        }
        Ok(sampler)
    }

    /// # Safety
    /// `part` is a new sampler that nothing else owns.
    unsafe fn push(&self, part: *mut sys::llama_sampler) {
        // SAFETY: the chain is live, and it takes the part over.
        unsafe { sys::llama_sampler_chain_add(self.chain.as_ptr(), part) };
    }

    /// A token for these logits. The caller says with [`Sampler::accept`] that it was used.
    ///
    /// Fails when a logit is not a number or when every token is banned.
    pub fn sample(&mut self, logits: &[f32]) -> Result<i32, LlamaError> {
        if logits.len() != self.n_vocab || logits.is_empty() {
            let m = format!("{} logits came for a vocabulary of {}", logits.len(), self.n_vocab);
            return Err(LlamaError::Sampling(m));
        }
        if self.plain_greedy {
            return likeliest(logits);
        }
        // One pass both copies and checks: no number that is smaller than infinity is the sign of a bad one.
        let mut good = true;
        self.candidates.clear();
        self.candidates.extend(logits.iter().enumerate().map(|(id, &logit)| {
            good &= logit < f32::INFINITY;
            sys::llama_token_data { id: id as i32, logit, p: 0.0 }
        }));
        if !good {
            return Err(no_numbers());
        }
        let mut array = sys::llama_token_data_array {
            data: self.candidates.as_mut_ptr(),
            size: self.candidates.len(),
            selected: -1,
            sorted: false,
        };
        // SAFETY: the chain is live and used by this thread alone; the array is not empty, describes the candidates and
        // is not used after they are.
        unsafe { sys::llama_sampler_apply(self.chain.as_ptr(), &mut array) };
        let chosen = usize::try_from(array.selected).ok().filter(|i| *i < array.size && !array.data.is_null());
        // SAFETY: llama.cpp keeps `data` pointing to `size` entries, and the index is below that.
        let chosen = chosen.map(|i| unsafe { *array.data.add(i) }).filter(|c| c.logit.is_finite());
        chosen.map(|c| c.id).ok_or_else(no_token)
    }

    /// This token was taken: the penalties count it.
    pub fn accept(&mut self, token: i32) {
        // SAFETY: the chain is live; the penalties only count the number, whatever it is.
        unsafe { sys::llama_sampler_accept(self.chain.as_ptr(), token) };
    }

    /// This token was drawn and taken before, by another sampler with the same rules and seed: afterwards this one is as
    /// that one was. llama.cpp draws one random number for each choice, however many candidates there are.
    pub fn replay(&mut self, token: i32) {
        if !self.plain_greedy {
            let mut only = sys::llama_token_data { id: token, logit: 0.0, p: 0.0 };
            let mut array = sys::llama_token_data_array { data: &mut only, size: 1, selected: -1, sorted: false };
            // SAFETY: the chain is live and used by this thread alone; the array describes one candidate, which outlives
            // the call.
            unsafe { sys::llama_sampler_apply(self.chain.as_ptr(), &mut array) };
        }
        self.accept(token);
    }

    /// The prompt, for the penalties; only its last `repeat_last_n` tokens are looked at.
    pub fn accept_prompt(&mut self, tokens: &[i32]) {
        let start = tokens.len().saturating_sub(self.history);
        tokens[start..].iter().for_each(|t| self.accept(*t));
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        // SAFETY: owned; frees its parts too.
        unsafe { sys::llama_sampler_free(self.chain.as_ptr()) };
    }
}

fn no_numbers() -> LlamaError {
    LlamaError::Sampling("the model computed logits that are not numbers; its file may be damaged".into())
}

fn no_token() -> LlamaError {
    LlamaError::Sampling("no token is left: every one is banned".into())
}

/// Logits that are compared side by side: a maximum each, or every comparison would wait for the one before.
const LANES: usize = 16;
/// Logits after which the maxima are looked at, so that the place of the largest need not be carried along.
const BLOCK: usize = 64 * LANES;

/// The token with the largest logit, the first of equals.
fn likeliest(logits: &[f32]) -> Result<i32, LlamaError> {
    let (mut best, mut best_block) = (f32::NEG_INFINITY, None);
    for (index, block) in logits.chunks(BLOCK).enumerate() {
        let (mut max, mut bad) = ([f32::NEG_INFINITY; LANES], [0u32; LANES]);
        let (whole, rest) = block.as_chunks::<LANES>();
        // What is missing to a whole row of lanes is never the largest.
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..rest.len()].copy_from_slice(rest);
        for row in whole.iter().chain([&last]) {
            for ((max, bad), logit) in max.iter_mut().zip(&mut bad).zip(row) {
                // A comparison with what is no number is false, so such a one is never the largest, but it is bad.
                *max = if *logit > *max { *logit } else { *max };
                *bad |= u32::from(logit.is_nan() | (*logit == f32::INFINITY));
            }
        }
        if bad != [0; LANES] {
            return Err(no_numbers());
        }
        let max = max.into_iter().fold(f32::NEG_INFINITY, f32::max);
        if max > best {
            (best, best_block) = (max, Some((index, block)));
        }
    }
    let (index, block) = best_block.ok_or_else(no_token)?;
    let within = block.iter().position(|l| *l == best).unwrap_or(0);
    Ok((index * BLOCK + within) as i32)
}

/// The natural logarithm of `chosen`'s probability and of the `n` likeliest tokens', likeliest first, by these logits
/// alone (before any sampling rule). Equal ones come in the order of their numbers.
pub fn logprobs(logits: &[f32], chosen: i32, n: usize) -> Result<(f32, Vec<(i32, f32)>), LlamaError> {
    let bad = |m: &str| Err(LlamaError::Sampling(m.into()));
    let Some(&of_chosen) = usize::try_from(chosen).ok().and_then(|i| logits.get(i)) else {
        return bad("the chosen token has no logit");
    };
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() || logits.iter().any(|l| l.is_nan()) {
        return Err(no_numbers());
    }
    let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
    let log_sum = sum.ln() + f64::from(max);
    let of = |logit: f32| (f64::from(logit) - log_sum) as f32;
    let mut order: Vec<usize> = (0..logits.len()).collect();
    let by_rank = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    let n = n.min(order.len());
    if n > 0 && n < order.len() {
        order.select_nth_unstable_by(n - 1, by_rank);
    }
    order.truncate(n);
    order.sort_unstable_by(by_rank);
    Ok((of(of_chosen), order.into_iter().map(|i| (i as i32, of(logits[i]))).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(sampling: &Sampling, logits: &[f32], times: usize) -> Vec<i32> {
        let mut sampler = Sampler::with_vocab_size(sampling, logits.len()).unwrap();
        (0..times)
            .map(|_| {
                let token = sampler.sample(logits).unwrap();
                sampler.accept(token);
                token
            })
            .collect()
    }

    fn greedy() -> Sampling {
        Sampling { temperature: 0.0, ..Sampling::default() }
    }

    #[test]
    fn greedy_takes_the_first_of_the_likeliest() {
        assert_eq!(draw(&greedy(), &[0.0, 3.0, 3.0, -1.0], 2), [1, 1]);
        let mut logits = vec![f32::NEG_INFINITY; 3 * BLOCK + 5];
        for at in [3 * BLOCK + 4, 2 * BLOCK, 2 * BLOCK - 1, 7, 0] {
            logits[at] = -2.5;
            assert_eq!(draw(&greedy(), &logits, 1), [at as i32]);
        }
    }

    #[test]
    fn the_short_way_of_greedy_is_the_chain_s() {
        let mut x = 1u32;
        for n in [1, 2, BLOCK - 1, BLOCK, 5 * BLOCK + 3] {
            let logits: Vec<f32> = (0..n)
                .map(|_| {
                    x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    // Few different values, so that there are equals.
                    (x >> 25) as f32 - 64.0
                })
                .collect();
            let mut chain = Sampler::with_vocab_size(&greedy(), n).unwrap();
            chain.plain_greedy = false;
            assert_eq!(draw(&greedy(), &logits, 1), [chain.sample(&logits).unwrap()], "{n}");
        }
    }

    #[test]
    fn the_seed_decides() {
        let logits: Vec<f32> = (0..200).map(|i| (i % 17) as f32 * 0.1).collect();
        let seeded = |seed| draw(&Sampling { seed: Some(seed), ..Sampling::default() }, &logits, 40);
        assert_eq!(seeded(7), seeded(7));
        assert_ne!(seeded(7), seeded(8));
        assert_eq!(seeded(u32::MAX), seeded(u32::MAX));
        let free = || draw(&Sampling::default(), &logits, 40);
        assert_ne!(free(), free());
    }

    #[test]
    fn a_sampler_that_replays_goes_on_as_the_one_before_would_have() {
        let logits: Vec<f32> = (0..300).map(|i| (i % 23) as f32 * 0.2).collect();
        let plain = Sampling { seed: Some(5), ..Sampling::default() };
        for sampling in [
            plain.clone(),
            Sampling { top_k: 40, top_p: 0.9, min_p: 0.01, temperature: 0.7, ..plain.clone() },
            Sampling { frequency_penalty: 0.5, repeat_penalty: 1.2, logit_bias: vec![(3, -50.0)], ..plain.clone() },
            Sampling { presence_penalty: 1.0, ..greedy() },
            greedy(),
        ] {
            let whole = draw(&sampling, &logits, 60);
            let mut again = Sampler::with_vocab_size(&sampling, logits.len()).unwrap();
            whole[..35].iter().for_each(|t| again.replay(*t));
            let rest: Vec<i32> = (0..25)
                .map(|_| {
                    let token = again.sample(&logits).unwrap();
                    again.accept(token);
                    token
                })
                .collect();
            assert_eq!(rest, whole[35..], "{sampling:?}");
        }
    }

    #[test]
    fn filters_keep_only_the_likeliest() {
        let logits = [1.0, 5.0, 4.9, 0.0];
        for sampling in [
            Sampling { top_k: 2, ..Sampling::default() },
            Sampling { top_p: 0.9, ..Sampling::default() },
            Sampling { min_p: 0.5, ..Sampling::default() },
        ] {
            let drawn = draw(&Sampling { seed: Some(1), ..sampling.clone() }, &logits, 100);
            assert!(drawn.iter().all(|t| [1, 2].contains(t)), "{sampling:?}");
            assert!(drawn.contains(&1) && drawn.contains(&2), "{sampling:?}");
        }
        assert!(draw(&Sampling { top_k: u32::MAX, ..Sampling::default() }, &logits, 1)[0] < 4);
    }

    #[test]
    fn penalties_count_what_was_taken_within_their_reach() {
        let logits = [3.0, 2.9, 2.8, -1.0];
        let s = Sampling { presence_penalty: 1.0, repeat_last_n: 2, ..greedy() };
        assert_eq!(draw(&s, &logits, 6), [0, 1, 2, 0, 1, 2]);
        assert_eq!(draw(&Sampling { repeat_penalty: 2.0, ..greedy() }, &logits, 3), [0, 1, 2]);
        let mut sampler = Sampler::with_vocab_size(&s, 4).unwrap();
        sampler.accept_prompt(&[0, 0, 0, 3, 1]);
        assert_eq!(sampler.sample(&logits).unwrap(), 0);
        sampler.accept_prompt(&[3, 0]);
        assert_eq!(sampler.sample(&logits).unwrap(), 1);
    }

    #[test]
    fn bias_moves_and_bans() {
        let with = |bias: Vec<(i32, f32)>| Sampling { logit_bias: bias, ..greedy() };
        assert_eq!(draw(&with(vec![(2, 100.0), (0, f32::NEG_INFINITY)]), &[9.0, 1.0, 0.0], 1), [2]);
        assert_eq!(draw(&with(vec![(1, f32::INFINITY)]), &[9.0, 1.0, 0.0], 1), [1]);
        assert!(Sampler::with_vocab_size(&with(vec![(3, 1.0)]), 3).is_err());
        assert!(Sampler::with_vocab_size(&with(vec![(-1, 1.0)]), 3).is_err());
        let all = with((0..3).map(|t| (t, f32::NEG_INFINITY)).collect());
        assert!(Sampler::with_vocab_size(&all, 3).unwrap().sample(&[0.0; 3]).is_err());
        let hot = Sampling { temperature: 1.0, ..all };
        assert!(Sampler::with_vocab_size(&hot, 3).unwrap().sample(&[0.0; 3]).is_err());
    }

    #[test]
    fn logits_that_are_no_numbers_are_refused() {
        for sampling in [greedy(), Sampling::default()] {
            let mut sampler = Sampler::with_vocab_size(&sampling, 3).unwrap();
            for logits in [&[0.0, f32::NAN, 1.0][..], &[0.0, f32::INFINITY, 1.0], &[f32::NEG_INFINITY; 3], &[0.0; 2]] {
                assert!(sampler.sample(logits).is_err(), "{logits:?}");
            }
            assert!(sampler.sample(&[0.0, 50.0, f32::NEG_INFINITY]).is_ok());
        }
        assert!(Sampler::with_vocab_size(&Sampling { temperature: f32::NAN, ..greedy() }, 3).is_err());
    }

    #[test]
    fn logprobs_are_a_log_softmax() {
        let (chosen, top) = logprobs(&[1.0, 2.0, 2.0, f32::NEG_INFINITY], 0, 2).unwrap();
        let sum = 1f64.exp() + 2.0 * 2f64.exp();
        assert!((f64::from(chosen) - (1.0 - sum.ln())).abs() < 1e-6);
        assert_eq!(top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2]);
        assert!((f64::from(top[0].1) - (2.0 - sum.ln())).abs() < 1e-6);
        assert_eq!(logprobs(&[1.0, 2.0], 1, 9).unwrap().1.len(), 2);
        assert!(logprobs(&[1.0], 1, 1).is_err() && logprobs(&[1.0], -1, 1).is_err());
        assert!(logprobs(&[f32::NAN, 1.0], 1, 1).is_err());
    }
}
