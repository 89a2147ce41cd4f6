//! Marks as the text of an SVG file.

use super::layout::{Anchor, Colour, Mark, Sheet, Text};
use std::fmt::Write;

/// The whole file.
pub fn text(sheet: &Sheet) -> String {
    let (w, h) = (sheet.w, sheet.h);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{w}\" height=\"{h}\" viewBox=\"0 0 {w} {h}\" \
         font-family=\"'DejaVu Sans', Helvetica, Arial, sans-serif\" fill=\"#262626\">\n\
         <rect width=\"{w}\" height=\"{h}\" fill=\"#ffffff\"/>\n"
    );
    for mark in &sheet.marks {
        let _ = match mark {
            Mark::Line { points, colour, width, .. } if points.len() == 1 => {
                let ((x, y), r, colour) = (points[0], 1.5 * width, hex(*colour));
                writeln!(out, "<circle cx=\"{x:.2}\" cy=\"{y:.2}\" r=\"{r}\" fill=\"{colour}\"/>")
            }
            Mark::Line { points, colour, width, dashed, opacity } => writeln!(
                out,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"{width}\" \
                 stroke-linejoin=\"round\"{}{}/>",
                list(points),
                hex(*colour),
                if *dashed { " stroke-dasharray=\"5 3\"" } else { "" },
                if *opacity < 1.0 { format!(" stroke-opacity=\"{opacity}\"") } else { String::new() },
            ),
            Mark::Area { points, colour, opacity } => writeln!(
                out,
                "<polygon points=\"{}\" fill=\"{}\" fill-opacity=\"{opacity}\"/>",
                list(points),
                hex(*colour)
            ),
            Mark::Text(t) => writeln!(out, "{}", words(t)),
        };
    }
    out + "</svg>\n"
}

fn words(t: &Text) -> String {
    let (x, y) = t.at;
    let anchor = match t.anchor {
        Anchor::Start => "",
        Anchor::Middle => " text-anchor=\"middle\"",
        Anchor::End => " text-anchor=\"end\"",
    };
    let turned = if t.upright { format!(" transform=\"rotate(-90 {x:.2} {y:.2})\"") } else { String::new() };
    let bold = if t.bold { " font-weight=\"bold\"" } else { "" };
    let raised = match t.raised.as_str() {
        "" => String::new(),
        e => format!("<tspan dy=\"{:.2}\" font-size=\"{:.2}\">{}</tspan>", -0.42 * t.size, 0.72 * t.size, escaped(e)),
    };
    let (size, text) = (t.size, escaped(&t.text));
    format!("<text x=\"{x:.2}\" y=\"{y:.2}\" font-size=\"{size}\"{anchor}{bold}{turned}>{text}{raised}</text>")
}

/// The text as XML has it; control characters, which XML cannot hold, as a question mark.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('?'),
            c => out.push(c),
        }
    }
    out
}

fn hex([r, g, b]: Colour) -> String {
    format!("#{r:02x}{g:02x}{b:02x}")
}

fn list(points: &[(f64, f64)]) -> String {
    points.iter().map(|(x, y)| format!("{x:.2},{y:.2}")).collect::<Vec<_>>().join(" ")
}
