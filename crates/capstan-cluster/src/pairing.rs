//! A short code that lets one machine join, and the desk that counts how often it was tried.
//!
//! A code is `42-K7QM2X`: two digits that tell which machine is meant (they are announced, and no secret), and six
//! letters that are. They give 30 bits, which would be nothing if codes could be tried at will or off line. But each
//! try is an exchange with this node, and the third wrong one ends the code: a guesser succeeds once in 350 million
//! pairings.
use std::fmt;
use std::str::FromStr;

/// Letters and digits that nobody mistakes for each other, read or heard.
const ALPHABET: &[u8; 32] = b"ABCDEFGHJKLMNPQRSTUVWXYZ23456789";
/// How many of them are in a code.
const LETTERS: usize = 6;
/// The two digits are from 10 to 99.
const PLATES: std::ops::RangeInclusive<u8> = 10..=99;
/// Random bytes that a code is made of: one for the digits and one for each letter.
pub const CODE_BYTES: usize = LETTERS + 1;
/// Wrong tries after which a code is useless.
pub const WRONG_MAX: u8 = 3;
/// How long nobody may try after a wrong try, in milliseconds.
pub const WRONG_PAUSE_MS: u64 = 1000;

/// Not a code at all, or mistyped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this is no pairing code ({0}); it has two digits and six letters, such as 42-K7QM2X, as `capstan pair` shows it \
     (the letters I and O and the digits 0 and 1 are not among the six)"
)]
pub struct BadCode(pub &'static str);

/// A pairing code.
#[derive(Clone, PartialEq, Eq)]
pub struct PairingCode {
    plate: u8,
    letters: [u8; LETTERS],
}

impl PairingCode {
    /// A code made of random bytes.
    pub fn new(random: &[u8; CODE_BYTES]) -> Self {
        // 90 does not divide 256, so some plates are a little likelier; they are no secret. 32 does.
        let plate = PLATES.start() + random[0] % (PLATES.end() - PLATES.start() + 1);
        let mut letters = [0; LETTERS];
        for (letter, byte) in letters.iter_mut().zip(&random[1..]) {
            *letter = ALPHABET[usize::from(byte % 32)];
        }
        Self { plate, letters }
    }

    /// The two digits that tell which machine is meant; no secret.
    pub fn plate(&self) -> u8 {
        self.plate
    }

    /// The secret part: what goes into the key exchange.
    pub fn secret(&self) -> &[u8] {
        &self.letters
    }

    /// Whether a text could be meant as a code and not as a ticket.
    pub fn looks_like(text: &str) -> bool {
        text.trim().starts_with(|c: char| c.is_ascii_digit())
    }
}

impl fmt::Display for PairingCode {
    /// What is typed on the other machine. It contains the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.plate, String::from_utf8_lossy(&self.letters))
    }
}

// Without the letters.
impl fmt::Debug for PairingCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PairingCode").field("plate", &self.plate).finish_non_exhaustive()
    }
}

impl FromStr for PairingCode {
    type Err = BadCode;

    fn from_str(text: &str) -> Result<Self, BadCode> {
        let mut plain = [0; LETTERS + 2];
        let mut len = 0;
        for c in text.chars().filter(|c| !c.is_whitespace() && *c != '-') {
            let place = plain.get_mut(len).ok_or(BadCode("it is too long"))?;
            *place = u8::try_from(c.to_ascii_uppercase()).map_err(|_| BadCode("a letter is not a Latin one"))?;
            len += 1;
        }
        if len < plain.len() {
            return Err(BadCode("it is too short"));
        }
        let digit = |c: u8| if c.is_ascii_digit() { Ok(c - b'0') } else { Err(BadCode("it begins with two digits")) };
        let plate = digit(plain[0])? * 10 + digit(plain[1])?;
        let mut letters = [0; LETTERS];
        letters.copy_from_slice(&plain[2..]);
        if !PLATES.contains(&plate) || letters.iter().any(|c| !ALPHABET.contains(c)) {
            return Err(BadCode("a letter or digit in it does not occur in codes"));
        }
        Ok(Self { plate, letters })
    }
}

/// Why a try was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PairError {
    /// No code is out.
    #[error(
        "no pairing is open there: the code was used, is too old, or was replaced; `capstan pair` there shows a fresh \
         one"
    )]
    Closed,
    /// The first two digits are another pairing's.
    #[error(
        "the code is another machine's, or was replaced; look at its first two digits, or run `capstan pair` there"
    )]
    OtherPlate,
    /// The letters are wrong.
    #[error(
        "the code is wrong; {} more tries are left until it is useless and `capstan pair` there has to show another", 
        .left
    )]
    Wrong {
        /// How many tries are left.
        left: u8,
    },
    /// Tried too often.
    #[error(
        "the code was tried {WRONG_MAX} times with wrong letters and is useless now; `capstan pair` there shows a fresh one"
    )]
    UsedUp,
    /// A wrong try was only just now.
    #[error("a wrong code was tried a moment ago; wait a second and try again")]
    Wait,
}

impl PairError {
    /// The HTTP status that says what kind of error it is.
    pub fn status(&self) -> u16 {
        match self {
            Self::Closed | Self::UsedUp => 410,
            Self::OtherPlate | Self::Wrong { .. } => 403,
            Self::Wait => 429,
        }
    }
}

#[derive(Clone, Debug)]
struct Open {
    /// Tells this pairing from an earlier or later one.
    number: u64,
    code: PairingCode,
    expires_ms: u64,
    wrong: u8,
    /// Nobody may try before.
    quiet_until_ms: u64,
}

/// The pairing that is open on this node, if one is. Times are milliseconds since 1970.
#[derive(Clone, Debug, Default)]
pub struct PairingDesk {
    open: Option<Open>,
    /// Why the last one is not open any more.
    used_up: bool,
    number: u64,
}

/// A try that has begun.
#[derive(Clone, Debug)]
pub struct Try {
    number: u64,
    /// The code that must be known.
    pub code: PairingCode,
}

impl Try {
    /// The number of the pairing that is tried.
    pub fn number(&self) -> u64 {
        self.number
    }
}

impl PairingDesk {
    /// Opens a pairing; an earlier one is closed by that. Gives its number.
    pub fn open(&mut self, code: PairingCode, ttl_ms: u64, now_ms: u64) -> u64 {
        self.number += 1;
        self.used_up = false;
        let expires_ms = now_ms.saturating_add(ttl_ms);
        self.open = Some(Open { number: self.number, code, expires_ms, wrong: 0, quiet_until_ms: 0 });
        self.number
    }

    /// Closes the pairing of this number.
    pub fn close(&mut self, number: u64) {
        self.open.take_if(|open| open.number == number);
    }

    /// Whether the pairing of this number is open.
    pub fn is_open(&self, number: u64, now_ms: u64) -> bool {
        self.open.as_ref().is_some_and(|open| open.number == number && now_ms < open.expires_ms)
    }

    fn current(&mut self, now_ms: u64) -> Result<&mut Open, PairError> {
        self.open.take_if(|open| now_ms >= open.expires_ms);
        let closed = if self.used_up { PairError::UsedUp } else { PairError::Closed };
        self.open.as_mut().ok_or(closed)
    }

    /// Begins a try. It counts only when it ends wrong: one that breaks off has told the other side nothing.
    pub fn begin(&mut self, plate: u8, now_ms: u64) -> Result<Try, PairError> {
        let open = self.current(now_ms)?;
        if open.code.plate != plate {
            return Err(PairError::OtherPlate);
        }
        if now_ms < open.quiet_until_ms {
            return Err(PairError::Wait);
        }
        Ok(Try { number: open.number, code: open.code.clone() })
    }

    /// Ends a try. A right one closes the pairing: a code is for one machine. Of many tries at the same time only as
    /// many count as may be wrong.
    pub fn end(&mut self, tried: &Try, right: bool, now_ms: u64) -> Result<(), PairError> {
        let open = self.current(now_ms)?;
        if open.number != tried.number {
            return Err(PairError::Closed);
        }
        if now_ms < open.quiet_until_ms {
            return Err(PairError::Wait);
        }
        if right {
            self.open = None;
            return Ok(());
        }
        open.wrong += 1;
        open.quiet_until_ms = now_ms.saturating_add(WRONG_PAUSE_MS);
        let left = WRONG_MAX - open.wrong;
        if left > 0 {
            return Err(PairError::Wrong { left });
        }
        self.open = None;
        self.used_up = true;
        Err(PairError::UsedUp)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn code() -> PairingCode {
        PairingCode::new(&[32, 0, 1, 2, 3, 4, 31])
    }

    #[test]
    fn a_code_survives_being_typed_by_a_person() {
        assert_eq!(code().to_string(), "42-ABCDE9");
        for typed in ["42-abcde9", " 42 ABC DE9\n", "42abcde9", "4-2-A-B-C-D-E-9"] {
            assert_eq!(typed.parse(), Ok(code()), "{typed}");
        }
        for bad in
            ["", "42", "42-ABCDE", "42-ABCDE99", "42-ABCDE0", "AB-ABCDEF", "09-ABCDEF", "42-ABCDÉF", "capstan1xy"]
        {
            assert!(bad.parse::<PairingCode>().is_err(), "{bad}");
        }
        assert!(PairingCode::looks_like(" 42-x") && !PairingCode::looks_like("capstan1abc"));
        assert!(!format!("{:?}", code()).contains("ABCDE9"));
    }

    #[test]
    fn three_wrong_tries_end_a_code_and_a_right_one_uses_it() {
        let mut desk = PairingDesk::default();
        assert_eq!(desk.begin(42, 0).unwrap_err(), PairError::Closed);
        let number = desk.open(code(), 60_000, 0);
        assert_eq!(desk.begin(43, 1).unwrap_err(), PairError::OtherPlate);
        let t = desk.begin(42, 1).unwrap();
        assert_eq!(desk.end(&t, false, 10), Err(PairError::Wrong { left: 2 }));
        assert_eq!(desk.begin(42, 10).unwrap_err(), PairError::Wait);
        let t = desk.begin(42, 10 + WRONG_PAUSE_MS).unwrap();
        assert_eq!(desk.end(&t, false, 2000), Err(PairError::Wrong { left: 1 }));
        let t = desk.begin(42, 4000).unwrap();
        assert_eq!(desk.end(&t, false, 4000), Err(PairError::UsedUp));
        assert!(!desk.is_open(number, 4000));
        // Useless means: also for who knows it.
        assert_eq!(desk.begin(42, 6000).unwrap_err(), PairError::UsedUp);

        let number = desk.open(code(), 60_000, 10_000);
        let (t, late) = (desk.begin(42, 10_001).unwrap(), desk.begin(42, 10_002).unwrap());
        assert!(desk.is_open(number, 10_003));
        assert_eq!(desk.end(&t, true, 10_003), Ok(()));
        assert_eq!(desk.end(&late, true, 10_004), Err(PairError::Closed), "a code is for one machine");
    }

    #[test]
    fn a_try_of_an_earlier_pairing_or_a_late_one_counts_nothing() {
        let mut desk = PairingDesk::default();
        desk.open(code(), 60_000, 0);
        let t = desk.begin(42, 1).unwrap();
        let second = desk.open(code(), 60_000, 2);
        assert_eq!(desk.end(&t, true, 3), Err(PairError::Closed));
        let t = desk.begin(42, 4).unwrap();
        assert_eq!(desk.end(&t, true, 60_002), Err(PairError::Closed));
        assert!(!desk.is_open(second, 60_002));
        let third = desk.open(code(), 1, 70_000);
        desk.close(second);
        assert!(desk.is_open(third, 70_000));
        desk.close(third);
        assert!(!desk.is_open(third, 70_000));
    }

    proptest! {
        #[test]
        fn however_tries_interleave_only_three_are_wrong(ends in prop::collection::vec((0u64..5000, 0usize..8), 1..64)) {
            let mut desk = PairingDesk::default();
            desk.open(code(), u64::MAX, 0);
            let tries: Vec<_> = (0..8).map(|_| desk.begin(42, 0).unwrap()).collect();
            let (mut now, mut wrong) = (0, 0);
            for (wait, which) in ends {
                now += wait;
                if matches!(desk.end(&tries[which], false, now), Err(PairError::Wrong { .. } | PairError::UsedUp)) {
                    wrong += u8::from(wrong < WRONG_MAX);
                }
            }
            prop_assert!(wrong <= WRONG_MAX);
            prop_assert_eq!(desk.begin(42, now + WRONG_PAUSE_MS).is_err(), wrong == WRONG_MAX);
        }

        #[test]
        fn no_text_panics_and_every_code_comes_back(text in ".{0,40}", random in any::<[u8; CODE_BYTES]>()) {
            let _ = text.parse::<PairingCode>();
            let code = PairingCode::new(&random);
            prop_assert_eq!(code.to_string().parse(), Ok(code));
        }
    }
}
