//! Letters for pictures without fonts: each is 5 x 7 points (an eighth row hangs below the line), and points that touch
//! are joined by strokes, so that text is smooth at any size and can be turned.

/// Columns of the letters from space to `~`, left to right; bit 0 is the top row.
const LETTERS: [[u8; 5]; 95] = [
    *b"\x00\x00\x00\x00\x00",
    *b"\x00\x00\x5f\x00\x00",
    *b"\x00\x07\x00\x07\x00",
    *b"\x14\x7f\x14\x7f\x14",
    *b"\x24\x2a\x7f\x2a\x12",
    *b"\x23\x13\x08\x64\x62",
    *b"\x36\x49\x56\x20\x50",
    *b"\x00\x00\x07\x00\x00",
    *b"\x00\x1c\x22\x41\x00",
    *b"\x00\x41\x22\x1c\x00",
    *b"\x2a\x1c\x7f\x1c\x2a",
    *b"\x08\x08\x3e\x08\x08",
    *b"\x00\x80\x60\x00\x00",
    *b"\x08\x08\x08\x08\x08",
    *b"\x00\x00\x40\x00\x00",
    *b"\x20\x10\x08\x04\x02",
    *b"\x3e\x41\x41\x41\x3e",
    *b"\x00\x42\x7f\x40\x00",
    *b"\x42\x61\x51\x49\x46",
    *b"\x22\x41\x49\x49\x36",
    *b"\x18\x14\x12\x7f\x10",
    *b"\x27\x45\x45\x45\x39",
    *b"\x3c\x4a\x49\x49\x30",
    *b"\x01\x71\x09\x05\x03",
    *b"\x36\x49\x49\x49\x36",
    *b"\x06\x49\x49\x29\x1e",
    *b"\x00\x00\x24\x00\x00",
    *b"\x00\x80\x64\x00\x00",
    *b"\x00\x08\x14\x22\x41",
    *b"\x14\x14\x14\x14\x14",
    *b"\x41\x22\x14\x08\x00",
    *b"\x02\x01\x51\x09\x06",
    *b"\x3e\x41\x5d\x55\x5e",
    *b"\x7c\x12\x11\x12\x7c",
    *b"\x7f\x49\x49\x49\x36",
    *b"\x3e\x41\x41\x41\x22",
    *b"\x7f\x41\x41\x22\x1c",
    *b"\x7f\x49\x49\x49\x41",
    *b"\x7f\x09\x09\x09\x01",
    *b"\x3e\x41\x49\x49\x7a",
    *b"\x7f\x08\x08\x08\x7f",
    *b"\x00\x41\x7f\x41\x00",
    *b"\x20\x40\x41\x3f\x01",
    *b"\x7f\x08\x14\x22\x41",
    *b"\x7f\x40\x40\x40\x40",
    *b"\x7f\x02\x0c\x02\x7f",
    *b"\x7f\x04\x08\x10\x7f",
    *b"\x3e\x41\x41\x41\x3e",
    *b"\x7f\x09\x09\x09\x06",
    *b"\x3e\x41\x51\x21\x5e",
    *b"\x7f\x09\x19\x29\x46",
    *b"\x46\x49\x49\x49\x31",
    *b"\x01\x01\x7f\x01\x01",
    *b"\x3f\x40\x40\x40\x3f",
    *b"\x1f\x20\x40\x20\x1f",
    *b"\x3f\x40\x38\x40\x3f",
    *b"\x63\x14\x08\x14\x63",
    *b"\x07\x08\x70\x08\x07",
    *b"\x61\x51\x49\x45\x43",
    *b"\x00\x7f\x41\x41\x00",
    *b"\x02\x04\x08\x10\x20",
    *b"\x00\x41\x41\x7f\x00",
    *b"\x04\x02\x01\x02\x04",
    *b"\x80\x80\x80\x80\x80",
    *b"\x00\x01\x02\x04\x00",
    *b"\x20\x54\x54\x54\x78",
    *b"\x7f\x48\x44\x44\x38",
    *b"\x38\x44\x44\x44\x20",
    *b"\x38\x44\x44\x48\x7f",
    *b"\x38\x54\x54\x54\x18",
    *b"\x00\x08\x7e\x09\x02",
    *b"\x18\xa4\xa4\xa4\x7c",
    *b"\x7f\x08\x04\x04\x78",
    *b"\x00\x44\x7d\x40\x00",
    *b"\x00\x80\x84\x7d\x00",
    *b"\x7f\x10\x28\x44\x00",
    *b"\x00\x41\x7f\x40\x00",
    *b"\x7c\x04\x18\x04\x78",
    *b"\x7c\x08\x04\x04\x78",
    *b"\x38\x44\x44\x44\x38",
    *b"\xfc\x24\x24\x24\x18",
    *b"\x18\x24\x24\x24\xfc",
    *b"\x7c\x08\x04\x04\x08",
    *b"\x48\x54\x54\x54\x24",
    *b"\x04\x3f\x44\x40\x20",
    *b"\x3c\x40\x40\x20\x7c",
    *b"\x1c\x20\x40\x20\x1c",
    *b"\x3c\x40\x30\x40\x3c",
    *b"\x44\x28\x10\x28\x44",
    *b"\x1c\xa0\xa0\xa0\x7c",
    *b"\x44\x64\x54\x4c\x44",
    *b"\x00\x08\x36\x41\x00",
    *b"\x00\x00\x7f\x00\x00",
    *b"\x00\x41\x36\x08\x00",
    *b"\x08\x04\x08\x10\x08",
];

/// Distance of two columns, of two rows and of two letters, for a text of height 1.
const COLUMN: f64 = 0.093;
const ROW: f64 = 0.12;
const ADVANCE: f64 = 0.58;

/// Columns of a letter, and the rows by which it is raised.
fn letter(c: char) -> ([u8; 5], f64) {
    let columns = match c {
        ' '..='~' => LETTERS[c as usize - ' ' as usize],
        '−' | '–' => LETTERS['-' as usize - ' ' as usize],
        '…' => *b"\x40\x00\x40\x00\x40",
        '·' => *b"\x00\x00\x08\x00\x00",
        '×' => *b"\x00\x28\x10\x28\x00",
        '²' => *b"\x00\x0d\x0b\x00\x00",
        'α' => *b"\x38\x44\x44\x38\x44",
        'ᾱ' => *b"\x39\x45\x45\x39\x44",
        'β' => *b"\xfe\x25\x25\x25\x1a",
        'σ' => *b"\x38\x44\x44\x4c\x34",
        '≤' => *b"\x00\x48\x54\x62\x41",
        '\u{303}' => return (LETTERS['~' as usize - ' ' as usize], 4.5),
        _ => *b"\x7f\x41\x41\x41\x7f",
    };
    (columns, 0.0)
}

/// Width of `text` at height 1.
pub fn width(text: &str) -> f64 {
    ADVANCE * text.chars().filter(|c| *c != '\u{303}').count() as f64
}

/// The strokes of `text` at height 1, from (0, 0) on the base line, y downwards. A letter that is not known is a box.
pub fn strokes(text: &str) -> Vec<[(f64, f64); 2]> {
    let mut strokes = Vec::new();
    let mut left = 0.0;
    for c in text.chars() {
        if c == '\u{303}' {
            left -= ADVANCE;
        }
        let (columns, raised) = letter(c);
        let at = |x: i32, y: i32| (0..5).contains(&x) && (0..8).contains(&y) && columns[x as usize] >> y & 1 == 1;
        let place = |x: i32, y: i32| (left + 0.08 + COLUMN * f64::from(x), ROW * (f64::from(y) - 6.0 - raised));
        for (x, y) in (0..5).flat_map(|x| (0..8).map(move |y| (x, y))).filter(|(x, y)| at(*x, *y)) {
            strokes.push([place(x, y); 2]);
            let diagonal = |dy: i32| at(x + 1, y + dy) && !at(x + 1, y) && !at(x, y + dy);
            let near = [(1, 0, at(x + 1, y)), (0, 1, at(x, y + 1)), (1, 1, diagonal(1)), (1, -1, diagonal(-1))];
            strokes.extend(near.iter().filter(|n| n.2).map(|n| [place(x, y), place(x + n.0, y + n.1)]));
        }
        left += ADVANCE;
    }
    strokes
}
