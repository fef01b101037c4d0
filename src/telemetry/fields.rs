//! How the fields of a line in the log look: as tracing-subscriber has them.
//!
//! It asks for a style for each name, and writes each value through `Debug` and two writers behind pointers. An access record has
//! twenty of them, which took a twelfth of the processor time of a small request. So what needs no style and no escapes is
//! written as it is, into one piece.

use std::error::Error;
use std::fmt::{self, Debug, Write as _};

use tracing::field::{Field, Visit};
use tracing_subscriber::field::{RecordFields, VisitOutput as _};
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::{DefaultFields, DefaultVisitor, Writer};

/// Room for the fields of an access record with long names.
const LINE: usize = 512;

/// Up to here a number of thousandths has no more digits than an `f64` keeps apart, and `Debug` shows no exponent.
const MOST_THOUSANDTHS: f64 = 1e15;

/// Writes `name=value`, with a space between fields.
#[derive(Debug)]
pub(super) struct Fields;

impl<'w> FormatFields<'w> for Fields {
    fn format_fields<R: RecordFields>(&self, mut writer: Writer<'w>, fields: R) -> fmt::Result {
        if writer.has_ansi_escapes() {
            return DefaultFields::new().format_fields(writer, fields);
        }
        let mut plain = Plain {
            line: String::with_capacity(LINE),
            empty: true,
            result: Ok(()),
        };
        fields.record(&mut plain);
        plain.result?;
        writer.write_str(&plain.line)
    }
}

struct Plain {
    line: String,
    /// Whether nothing has been recorded; an empty message has.
    empty: bool,
    /// The first failure, for which the line is not written.
    result: fmt::Result,
}

impl Plain {
    fn name(&mut self, field: &Field) {
        if !std::mem::replace(&mut self.empty, false) {
            self.line.push(' ');
        }
        self.line.push_str(field.name());
        self.line.push('=');
    }

    fn digits(&mut self, number: u64) {
        self.line.push_str(itoa::Buffer::new().format(number));
    }

    fn write(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        if self.result.is_ok() {
            self.name(field);
            self.result = self.line.write_fmt(value);
        }
    }

    /// Leaves to the library what has no name, or holds the words of others.
    fn leave(&mut self, visit: impl FnOnce(&mut DefaultVisitor<'_>)) {
        if self.result.is_ok() {
            let mut visitor = DefaultVisitor::new(Writer::new(&mut self.line), self.empty);
            visit(&mut visitor);
            self.result = visitor.finish();
            self.empty = false;
        }
    }
}

impl Visit for Plain {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            return self.leave(|visitor| visitor.record_str(field, value));
        }
        if !value.bytes().all(is_plain) {
            return self.write(field, format_args!("{value:?}"));
        }
        self.name(field);
        self.line.push('"');
        self.line.push_str(value);
        self.line.push('"');
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.name(field);
        self.digits(value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        let thousandths = (value * 1e3).round();
        let exact = value.is_sign_positive() && thousandths < MOST_THOUSANDTHS && thousandths / 1e3 == value;
        if !exact {
            return self.write(field, format_args!("{value:?}"));
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a whole number in range"
        )]
        let thousandths = thousandths as u64;
        self.name(field);
        self.digits(thousandths / 1000);
        self.line.push('.');
        let mut rest = thousandths % 1000;
        for unit in [100, 10, 1] {
            self.digits(rest / unit);
            rest %= unit;
            if rest == 0 {
                break;
            }
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.leave(|visitor| visitor.record_error(field, value));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            return self.leave(|visitor| visitor.record_debug(field, value));
        }
        self.write(field, format_args!("{value:?}"));
    }
}

/// Whether `Debug` shows a character as it is.
fn is_plain(byte: u8) -> bool {
    matches!(byte, b' '..=b'~') && byte != b'"' && byte != b'\\'
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    use proptest::prelude::*;
    use tracing::{info, subscriber};

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn line(ours: bool, colour: bool, log: impl FnOnce()) -> String {
        let sink = Sink::default();
        let lines = sink.clone();
        let builder = tracing_subscriber::fmt()
            .without_time()
            .with_ansi(colour)
            .with_writer(move || lines.clone());
        if ours {
            subscriber::with_default(builder.fmt_fields(Fields).finish(), log);
        } else {
            subscriber::with_default(builder.finish(), log);
        }
        let bytes = sink.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    proptest! {
        #[test]
        fn a_line_looks_as_the_library_writes_it(
            text in any::<String>(), number in any::<u64>(), signed in any::<i64>(), real in any::<f64>(),
            present in any::<Option<bool>>(), colour in any::<bool>(),
        ) {
            let error = io::Error::other(text.clone());
            let log = || {
                info!(
                    text, display = %text, number, signed, real, present, error = &error as &dyn Error, debug = ?error,
                    "{text} happened"
                );
                info!(number);
                info!(number, "");
                info!(whole = (number >> 20) as f64, thousandths = number as f64 / 1e3, few = (number % 3000) as f64 / 1e3);
            };
            prop_assert_eq!(line(true, colour, log), line(false, colour, log));
        }
    }
}
