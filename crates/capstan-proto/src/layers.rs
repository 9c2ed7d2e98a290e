//! A half-open range of layers that is never empty.
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Layers `start..end`, with `start < end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "(u32, u32)", into = "(u32, u32)")]
pub struct LayerRange {
    start: u32,
    end: u32,
}

/// Why two numbers are not a layer range.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum BadRange {
    /// `start >= end`.
    #[error("the layer range {0}..{1} is empty; write START..END with START smaller than END")]
    Empty(u32, u32),
    /// Not of the form `START..END`.
    #[error("{0:?} is not a layer range; write START..END, for example 0..10 for the first ten layers")]
    Syntax(String),
}

impl LayerRange {
    /// The range `start..end`, or why it is none.
    pub fn new(start: u32, end: u32) -> Result<Self, BadRange> {
        if start < end { Ok(Self { start, end }) } else { Err(BadRange::Empty(start, end)) }
    }
    /// The first layer.
    pub fn start(self) -> u32 {
        self.start
    }
    /// One past the last layer.
    pub fn end(self) -> u32 {
        self.end
    }
    /// How many layers; at least one.
    pub fn count(self) -> u32 {
        self.end - self.start
    }
    /// Whether `layer` lies inside.
    pub fn contains(self, layer: u32) -> bool {
        (self.start..self.end).contains(&layer)
    }
}

impl TryFrom<(u32, u32)> for LayerRange {
    type Error = BadRange;
    fn try_from((start, end): (u32, u32)) -> Result<Self, BadRange> {
        Self::new(start, end)
    }
}

impl From<LayerRange> for (u32, u32) {
    fn from(r: LayerRange) -> Self {
        (r.start, r.end)
    }
}

impl fmt::Display for LayerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

impl FromStr for LayerRange {
    type Err = BadRange;
    fn from_str(s: &str) -> Result<Self, BadRange> {
        let bad = || BadRange::Syntax(s.chars().take(40).collect());
        let (a, b) = s.split_once("..").ok_or_else(bad)?;
        Self::new(a.trim().parse().map_err(|_| bad())?, b.trim().parse().map_err(|_| bad())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_is_empty_or_no_range() {
        assert_eq!("3..7".parse::<LayerRange>().unwrap().count(), 4);
        assert_eq!(LayerRange::new(4, 4), Err(BadRange::Empty(4, 4)));
        for bad in ["", "3", "3..", "..3", "a..b", "-1..3", "7..3"] {
            assert!(bad.parse::<LayerRange>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_empty_range_cannot_arrive_by_wire() {
        let bytes = postcard::to_stdvec(&(5u32, 5u32)).unwrap();
        assert!(postcard::from_bytes::<LayerRange>(&bytes).is_err());
    }
}
