//! Guesses from what was said before: where the last few tokens stood earlier, what followed them there may follow now.
//!
//! Once a place is found it is followed token by token while it goes on to be right, which costs nothing, and over one
//! token that differs: an edited text differs in single words.
use std::collections::HashMap;

/// Tokens that must agree before a place is trusted: the longer first.
const LENGTHS: [usize; 2] = [3, 2];
/// Right guesses in a row after which a place is followed over a token that differs.
const FIRM: u32 = 6;

/// Where each short run of tokens of a sequence stood last.
#[derive(Debug, Default)]
pub(crate) struct Ngrams {
    /// Run of tokens to the position after it; runs of two have -1 in front.
    after: HashMap<[i32; 3], u32>,
    /// Tokens up to here are in `after`.
    indexed: usize,
    /// The place that is followed: the position whose token is expected at the position `at`.
    place: Option<Place>,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    source: usize,
    at: usize,
    /// Right guesses in a row.
    streak: u32,
}

/// How well founded a guess is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ground {
    /// The place was just found.
    Fresh,
    /// It was right before.
    Followed,
}

fn key(run: &[i32]) -> [i32; 3] {
    match *run {
        [a, b, c] => [a, b, c],
        [a, b] => [-1, a, b],
        _ => [-1; 3],
    }
}

impl Ngrams {
    /// The token that may come at position `tokens.len() + ahead.len()`: `tokens` are certain, `ahead` guessed.
    pub fn guess(&mut self, tokens: &[i32], ahead: &[i32]) -> Option<(i32, Ground)> {
        self.index(tokens);
        let (len, target) = (tokens.len(), tokens.len() + ahead.len());
        let token_at = |i: usize| if i < len { tokens.get(i) } else { ahead.get(i - len) }.copied();
        if self.place.is_none_or(|p| p.at > target) {
            self.place = self.find(tokens, ahead).map(|source| Place { source, at: target, streak: 0 });
        }
        let place = self.place?;
        // What is followed may reach the present: a text that repeats itself is its own source.
        let token = token_at(place.source + (target - place.at))?;
        Some((token, if place.streak > 0 { Ground::Followed } else { Ground::Fresh }))
    }

    /// The token that came at this position, which had been guessed or could have been.
    pub fn learn(&mut self, position: usize, token: i32, tokens: &[i32]) {
        let Some(place) = &mut self.place else { return };
        if position < place.at {
            return;
        }
        let source = place.source + (position - place.at);
        let right = tokens.get(source) == Some(&token);
        let firm = place.streak >= FIRM;
        *place = Place { source: source + 1, at: position + 1, streak: if right { place.streak + 1 } else { 0 } };
        if !right && !firm {
            self.place = None;
        }
    }

    fn find(&self, tokens: &[i32], ahead: &[i32]) -> Option<usize> {
        LENGTHS.iter().find_map(|&n| {
            let guessed = &ahead[ahead.len() - n.min(ahead.len())..];
            let certain = n - guessed.len();
            let mut run = tokens.get(tokens.len().checked_sub(certain)?..)?.to_vec();
            run.extend_from_slice(guessed);
            self.after.get(&key(&run)).map(|at| *at as usize)
        })
    }

    /// Takes runs up to the last token but one: the last run would only find itself.
    fn index(&mut self, tokens: &[i32]) {
        for end in self.indexed.max(1)..tokens.len() {
            for n in LENGTHS {
                if let Some(run) = end.checked_sub(n).and_then(|start| tokens.get(start..end)) {
                    self.after.insert(key(run), end as u32);
                }
            }
        }
        self.indexed = self.indexed.max(tokens.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_before_is_guessed_also_after_guesses() {
        let mut n = Ngrams::default();
        let tokens = [1, 2, 3, 4, 5, 9, 1, 2, 3];
        assert_eq!(n.guess(&tokens, &[]), Some((4, Ground::Fresh)));
        assert_eq!(n.guess(&tokens, &[4]), Some((5, Ground::Fresh)));
        n.learn(9, 4, &[1, 2, 3, 4, 5, 9, 1, 2, 3, 4]);
        assert_eq!(n.guess(&[1, 2, 3, 4, 5, 9, 1, 2, 3, 4], &[]), Some((5, Ground::Followed)));
        assert_eq!(Ngrams::default().guess(&[1, 2, 3, 4], &[]), None);
        assert_eq!(Ngrams::default().guess(&[1], &[]), None);
    }

    #[test]
    fn a_text_that_repeats_itself_is_its_own_source() {
        let mut n = Ngrams::default();
        let tokens = [7, 8, 7, 8, 7, 8];
        let mut ahead = Vec::new();
        for want in [7, 8, 7, 8, 7] {
            let (token, _) = n.guess(&tokens, &ahead).unwrap();
            assert_eq!(token, want);
            ahead.push(token);
        }
    }

    #[test]
    fn a_firm_place_is_followed_over_one_different_token() {
        let original: Vec<i32> = (100..130).collect();
        let mut n = Ngrams::default();
        let mut text = original.clone();
        text.extend([1, 100, 101, 102]);
        for (i, &before) in original.iter().enumerate().skip(3) {
            let token = if i == 15 { 77 } else { before };
            let guess = n.guess(&text, &[]).map(|g| g.0);
            assert_eq!(guess, Some(before), "at {i}");
            text.push(token);
            n.learn(text.len() - 1, token, &text);
        }
    }

    #[test]
    fn a_wrong_place_is_left() {
        let mut n = Ngrams::default();
        let mut text = vec![1, 2, 3, 1, 2];
        assert!(n.guess(&text, &[]).is_some());
        text.push(50);
        n.learn(5, 50, &text);
        assert_eq!(n.guess(&text, &[]), None);
    }
}
