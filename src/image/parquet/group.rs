//! Which rows of which batches make up each row group.

use crate::dataset::Table;

/// Most rows of a row group: enough for long runs, few enough for readers to share the groups among threads. A
/// multiple of 8, so that every piece of a bitmap starts at a byte.
pub const ROWS: u64 = 1 << 20;

/// Rows `start..start + rows` of a batch. `start` is a multiple of [`ROWS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index of the batch.
    pub batch: usize,
    /// First row in the batch.
    pub start: u64,
    /// Number of rows; never 0.
    pub rows: u64,
}

/// The rows of one row group, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// Number of rows.
    pub rows: u64,
    /// Where they come from.
    pub pieces: Vec<Piece>,
}

/// Cuts large batches and gathers small ones; a batch that is not large is never cut.
pub fn groups(table: &Table) -> Vec<Group> {
    let mut groups = Vec::new();
    let mut current = Group::default();
    for (batch, rows) in table.batches.iter().map(|batch| batch.rows).enumerate() {
        let mut start = 0;
        while start < rows {
            let piece = Piece { batch, start, rows: (rows - start).min(ROWS) };
            if current.rows + piece.rows > ROWS {
                groups.push(std::mem::take(&mut current));
            }
            current.rows += piece.rows;
            current.pieces.push(piece);
            start += piece.rows;
        }
    }
    if current.rows > 0 {
        groups.push(current);
    }
    groups
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_schema::Schema;

    use super::*;
    use crate::dataset::Batch;

    #[test]
    fn large_batches_are_cut_and_small_ones_gathered() {
        let rows = [10, 0, 20, 2 * ROWS + 5, ROWS - 5, 7];
        let batches = rows.iter().map(|rows| Batch { rows: *rows, columns: Vec::new() }).collect();
        let groups = groups(&Table { schema: Arc::new(Schema::empty()), batches });
        let piece = |batch, start, rows| Piece { batch, start, rows };
        let expected = [
            vec![piece(0, 0, 10), piece(2, 0, 20)],
            vec![piece(3, 0, ROWS)],
            vec![piece(3, ROWS, ROWS)],
            vec![piece(3, 2 * ROWS, 5), piece(4, 0, ROWS - 5)],
            vec![piece(5, 0, 7)],
        ];
        assert_eq!(groups.iter().map(|group| group.pieces.clone()).collect::<Vec<_>>(), expected);
        assert_eq!(groups.iter().map(|group| group.rows).collect::<Vec<_>>(), [30, ROWS, ROWS, ROWS, 7]);
    }
}
