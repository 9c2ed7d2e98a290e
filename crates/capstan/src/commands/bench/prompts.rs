//! Prompts of about a given length that share no beginning, so that no server's prefix cache flatters itself.

/// Common words: with the space before it, each is one token of nearly every vocabulary.
const WORDS: &str = "\
    time year people way day man thing woman life child world school state family student group country problem hand \
    part place case week company system program question work government number night point home water room mother \
    area money story fact month lot right study book eye job word business issue side kind head house service friend \
    father power hour game line end member law car city community name president team minute idea kid body \
    information back parent face others level office door health person art war history party result change morning \
    reason research girl guy moment air teacher force education foot boy age policy music market sense nation plan \
    college interest death experience effect use class control field development role effort rate heart drug show \
    leader light voice wife police mind price report decision son view relationship town road arm difference value \
    building action season society tax director position player record paper space ground form event official matter \
    center couple site project activity star table need court oil situation cost industry figure street image phone \
    data picture practice piece land product doctor wall patient worker news test movie north love support \
    technology step baby computer type attention film tree source organization hair window culture chance brother \
    energy period course summer plant opportunity term letter condition choice rule daughter south husband floor \
    campaign material population call economy hospital church risk fire future bank west sport board subject officer \
    east rest behavior performance top goal second bed order author blood agency nature color store sound movement \
    page race concern series language response animal factor decade article east artist scene stock career treatment";

/// Makes prompts out of a seed: the same seed gives the same prompts, in every version.
///
/// Number `i` begins with another word than its neighbours do; only after [`Prompts::openings`] prompts a first word
/// comes again, and then before another second word.
#[derive(Clone, Debug)]
pub struct Prompts {
    seed: u64,
    words: Vec<&'static str>,
    /// First words, shuffled. A capital makes another token of a word, so there are twice as many as words.
    openings: Vec<String>,
}

impl Prompts {
    /// The prompts of a seed.
    pub fn new(seed: u64) -> Self {
        let mut words: Vec<&'static str> = WORDS.split_whitespace().collect();
        words.sort_unstable();
        words.dedup();
        let mut openings: Vec<String> = words.iter().flat_map(|w| [w.to_string(), capitalised(w)]).collect();
        let mut random = Random(seed);
        for i in (1..openings.len()).rev() {
            openings.swap(i, random.below(i + 1));
        }
        Self { seed, words, openings }
    }

    /// Prompt number `index`, of `words` words, at least one.
    pub fn text(&self, index: u64, words: usize) -> String {
        let (openings, index) = (self.openings.len() as u64, index);
        let mut text = self.openings[(index % openings) as usize].clone();
        // The index goes through the generator once, so that neighbours have nothing in common.
        let mut random = Random(Random(self.seed ^ index.rotate_left(32)).next());
        for i in 1..words {
            // The second word tells prompts apart that had to share the first.
            let next =
                if i == 1 { (index / openings) as usize % self.words.len() } else { random.below(self.words.len()) };
            text.push(' ');
            text.push_str(self.words[next]);
        }
        text
    }

    /// How many prompts in a row begin differently.
    #[cfg(test)]
    fn openings(&self) -> u64 {
        self.openings.len() as u64
    }
}

/// How many words make a prompt of about `wanted` tokens, when one of `words` words had `tokens`.
///
/// A server whose vocabulary differs wildly from what is expected is met half way: the length never changes more
/// than eightfold.
pub fn words_for(wanted: u32, words: usize, tokens: u64) -> usize {
    let (wanted, words) = (wanted as usize, words.max(1));
    let scaled = (wanted as u128 * words as u128 / u128::from(tokens.max(1))) as usize;
    scaled.clamp((wanted / 8).max(1), wanted.saturating_mul(8))
}

fn capitalised(word: &str) -> String {
    let (first, rest) = word.split_at(1);
    first.to_ascii_uppercase() + rest
}

/// SplitMix64. Ours rather than a crate's, because a crate may change what a seed gives, and old measurements could
/// not be repeated then.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is far below 2³², so that the bias does not matter.
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_two_prompts_begin_alike() {
        let prompts = Prompts::new(7);
        let first = |text: String| text.split(' ').next().map(str::to_string);
        let openings: HashSet<_> = (0..prompts.openings()).map(|i| first(prompts.text(i, 8))).collect();
        assert_eq!(openings.len() as u64, prompts.openings());
        assert!(prompts.openings() > 400, "{}", prompts.openings());

        let pairs: HashSet<_> = (0..5 * prompts.openings()).map(|i| prompts.text(i, 2)).collect();
        assert_eq!(pairs.len() as u64, 5 * prompts.openings(), "then the second word tells them apart");
    }

    #[test]
    fn a_seed_is_a_set_of_prompts_for_ever() {
        assert_eq!(Prompts::new(1).text(5, 100), Prompts::new(1).text(5, 100));
        assert_ne!(Prompts::new(1).text(5, 100), Prompts::new(2).text(5, 100));
        assert_eq!(Prompts::new(1).text(0, 100).split(' ').count(), 100);
        assert_eq!(Prompts::new(1).text(0, 1).split(' ').count(), 1);
        // The generator's published first outputs for seed 0.
        let mut random = Random(0);
        assert_eq!((random.next(), random.next()), (0xE220_A839_7B1D_CDAF, 0x6E78_9E6A_A1B9_65F4));
    }

    #[test]
    fn lengths_follow_what_a_server_counted() {
        assert_eq!((words_for(512, 512, 512), words_for(512, 512, 1024), words_for(512, 100, 110)), (512, 256, 465));
        assert_eq!((words_for(512, 512, 0), words_for(512, 512, 1 << 40), words_for(1, 1, 9)), (4096, 64, 1));
    }
}
