//! How the fields of a line in the log look: as tracing-subscriber has them.
//!
//! It asks for a style for each name, and writes each value through `Debug`. An access record has twenty of them, which took a
//! twelfth of the processor time of a small request. So what needs no style and no escapes is written as it is.

use std::error::Error;
use std::fmt::{self, Debug};

use tracing::field::{Field, Visit};
use tracing_subscriber::field::{RecordFields, VisitOutput as _};
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::{DefaultFields, DefaultVisitor, Writer};

/// Writes `name=value`, with a space between fields.
#[derive(Debug)]
pub(super) struct Fields;

impl<'w> FormatFields<'w> for Fields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'w>, fields: R) -> fmt::Result {
        if writer.has_ansi_escapes() {
            return DefaultFields::new().format_fields(writer, fields);
        }
        let mut plain = Plain {
            writer,
            empty: true,
            result: Ok(()),
        };
        fields.record(&mut plain);
        plain.result
    }
}

struct Plain<'w> {
    writer: Writer<'w>,
    empty: bool,
    /// The first failure; nothing is written after it.
    result: fmt::Result,
}

impl Plain<'_> {
    fn write(&mut self, field: &Field, value: impl FnOnce(&mut Writer<'_>) -> fmt::Result) {
        if self.result.is_ok() {
            self.result = self.name(field).and_then(|()| value(&mut self.writer));
        }
    }

    fn name(&mut self, field: &Field) -> fmt::Result {
        if !std::mem::replace(&mut self.empty, false) {
            self.writer.write_char(' ')?;
        }
        self.writer.write_str(field.name())?;
        self.writer.write_char('=')
    }

    /// Leaves to the library what has no name, or holds the words of others.
    fn leave(&mut self, visit: impl FnOnce(&mut DefaultVisitor<'_>)) {
        if self.result.is_ok() {
            let mut visitor = DefaultVisitor::new(self.writer.by_ref(), self.empty);
            visit(&mut visitor);
            self.result = visitor.finish();
            self.empty = false;
        }
    }
}

impl Visit for Plain<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            return self.leave(|visitor| visitor.record_str(field, value));
        }
        self.write(field, |writer| {
            if value.bytes().all(is_plain) {
                writer.write_char('"')?;
                writer.write_str(value)?;
                writer.write_char('"')
            } else {
                write!(writer, "{value:?}")
            }
        });
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.write(field, |writer| write!(writer, "{value}"));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.leave(|visitor| visitor.record_error(field, value));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            return self.leave(|visitor| visitor.record_debug(field, value));
        }
        self.write(field, |writer| write!(writer, "{value:?}"));
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
            };
            prop_assert_eq!(line(true, colour, log), line(false, colour, log));
        }
    }
}
