//! Rows of a micro-batch as llama.cpp wants them: parallel arrays that we own.
use capstan_proto::data::{Payload, Row};
use llama_cpp_sys_2 as sys;

/// The arrays behind a `llama_batch`, kept between micro-batches so that their memory is reused.
#[derive(Default)]
pub(crate) struct Batch {
    /// Hidden states that had to be widened.
    padded: Vec<f32>,
    pos: Vec<i32>,
    seq_count: Vec<i32>,
    seq: Vec<i32>,
    seq_of_row: Vec<*mut i32>,
    output: Vec<i8>,
}

/// How a model wants its rows.
#[derive(Clone, Copy)]
pub(crate) struct RowShape {
    /// Floats that a row of hidden states has in the batch; shorter ones are padded with zeros.
    pub width: usize,
    /// Positions of a row of hidden states: 4 for M-RoPE, else 1. Tokens always have one.
    pub positions: usize,
    /// Flag every row as output.
    pub all_outputs: bool,
}

impl Batch {
    /// Takes rows that were checked: positions and slots fit an `i32`, the payload has one entry a row and no hidden
    /// state is wider than the shape.
    pub(crate) fn fill(&mut self, rows: &[Row], payload: &Payload, shape: RowShape) {
        let n = rows.len();
        self.padded.clear();
        let positions = match payload {
            Payload::Tokens(_) => 1,
            Payload::Hidden(hidden) => {
                let width = hidden.len().checked_div(n).unwrap_or(0);
                // As wide as the model wants them, they are taken where they are.
                if width > 0 && width < shape.width {
                    self.padded.resize(n * shape.width, 0.0);
                    for (to, from) in self.padded.chunks_mut(shape.width).zip(hidden.chunks(width)) {
                        to[..width].copy_from_slice(from);
                    }
                }
                shape.positions
            }
        };
        // Section by section; text has the same position in the first three and zero in the fourth.
        self.pos.clear();
        for section in 0..positions {
            self.pos.extend(rows.iter().map(|r| if section < 3 { r.pos as i32 } else { 0 }));
        }
        self.seq_count.clear();
        self.seq_count.resize(n, 1);
        self.seq.clear();
        self.seq.extend(rows.iter().map(|r| r.slot as i32));
        self.output.clear();
        self.output.extend(rows.iter().map(|r| i8::from(shape.all_outputs || r.output)));
    }

    /// The C struct, which points into this one and into the payload it was filled with, and is valid until either is
    /// changed or dropped. llama.cpp only reads what it points to.
    pub(crate) fn raw(&mut self, payload: &Payload) -> sys::llama_batch {
        self.seq_of_row.clear();
        self.seq_of_row.extend(self.seq.iter_mut().map(std::ptr::from_mut));
        let (token, embd) = match payload {
            Payload::Tokens(tokens) => (tokens.as_ptr().cast_mut(), std::ptr::null_mut()),
            Payload::Hidden(hidden) if self.padded.is_empty() => (std::ptr::null_mut(), hidden.as_ptr().cast_mut()),
            Payload::Hidden(_) => (std::ptr::null_mut(), self.padded.as_mut_ptr()),
        };
        sys::llama_batch {
            n_tokens: self.seq.len() as i32,
            token,
            embd,
            pos: self.pos.as_mut_ptr(),
            n_seq_id: self.seq_count.as_mut_ptr(),
            seq_id: self.seq_of_row.as_mut_ptr(),
            logits: self.output.as_mut_ptr(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_states_are_padded_and_have_a_position_in_each_section() {
        let rows = [5, 6].map(|pos| Row { slot: 2, pos, output: pos == 6 });
        let mut batch = Batch::default();
        let shape = RowShape { width: 3, positions: 4, all_outputs: false };
        let narrow = Payload::Hidden(vec![1.0, 2.0, 3.0, 4.0]);
        batch.fill(&rows, &narrow, shape);
        assert_eq!(batch.padded, [1.0, 2.0, 0.0, 3.0, 4.0, 0.0]);
        assert_eq!(batch.pos, [5, 6, 5, 6, 5, 6, 0, 0]);
        assert_eq!((&batch.seq[..], &batch.output[..]), (&[2, 2][..], &[0, 1][..]));
        assert!(batch.raw(&narrow).token.is_null());
        assert_eq!(batch.raw(&narrow).embd, batch.padded.as_mut_ptr());
        let fitting = vec![0.5; 6];
        let at = fitting.as_ptr();
        let fitting = Payload::Hidden(fitting);
        batch.fill(&rows, &fitting, shape);
        assert_eq!(batch.raw(&fitting).embd.cast_const(), at, "taken where they are");
        let tokens = Payload::Tokens(vec![7, 8]);
        batch.fill(&rows, &tokens, RowShape { all_outputs: true, ..shape });
        assert_eq!((&batch.pos[..], &batch.output[..]), (&[5, 6][..], &[1, 1][..]));
        assert!(batch.raw(&tokens).embd.is_null());
    }
}
