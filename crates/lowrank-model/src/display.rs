//! How counts, and text that others wrote, are shown to people.

/// 46702792704 → `46,702,792,704`. By hand: ten lines are less than a dependency of every crate.
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Foreign text for a one-line message: escaped, and not longer than a line.
pub fn clip(text: &str) -> String {
    const CHARS_MAX: usize = 200;
    let mut escaped = text.chars().flat_map(|c| {
        // Quotes break no line.
        let plain = matches!(c, '"' | '\'').then_some(c);
        plain.into_iter().chain(c.escape_debug().filter(move |_| plain.is_none()))
    });
    let mut clipped: String = escaped.by_ref().take(CHARS_MAX).collect();
    if escaped.next().is_some() {
        clipped.push('…');
    }
    clipped
}

/// A message that may quote foreign text, as parsers' messages do: no control characters, and if it is long, its
/// beginning and its end, where parsers say the line.
pub fn abridge(message: &str) -> String {
    const CHARS_MAX: usize = 300;
    const END_CHARS: usize = 80;
    let shown = |chars: &str| -> String {
        chars.chars().map(|c| if c.is_control() { c.escape_debug().to_string() } else { c.into() }).collect()
    };
    if message.char_indices().nth(CHARS_MAX).is_none() {
        return shown(message);
    }
    let head = message.char_indices().nth(CHARS_MAX - END_CHARS).map_or(message.len(), |(at, _)| at);
    let tail = message.char_indices().rev().nth(END_CHARS - 1).map_or(0, |(at, _)| at);
    format!("{} … {}", shown(&message[..head]), shown(&message[tail..]))
}

#[cfg(test)]
mod tests {
    use super::{abridge, clip, grouped};

    #[test]
    fn foreign_text_stays_on_a_short_line() {
        assert_eq!(clip("a\nb"), "a\\nb");
        assert_eq!(clip("\"it's\"\\"), "\"it's\"\\\\");
        assert_eq!(clip(&"ä".repeat(201)), "ä".repeat(200) + "…");
        assert_eq!(abridge("`a`, \u{1b}[31m at line 1"), "`a`, \\u{1b}[31m at line 1");
        let long = abridge(&format!("begin {}\n at line 7", "é".repeat(1000)));
        assert!(long.starts_with("begin é") && long.ends_with("é\\n at line 7"), "{long}");
        assert_eq!(long.chars().count(), 300 + 3 + 1);
    }

    #[test]
    fn counts_are_grouped_by_thousands() {
        for (count, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (46_702_792_704, "46,702,792,704")] {
            assert_eq!(grouped(count), text);
        }
    }
}
