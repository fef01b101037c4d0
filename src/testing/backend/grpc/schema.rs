//! Messages of `demo.Greeter` and the descriptors reflection shows; field numbers must agree.

use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{
    DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet, MethodDescriptorProto,
    ServiceDescriptorProto,
};

/// Asks for a greeting.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct HelloRequest {
    /// Who to greet.
    #[prost(string, tag = "1")]
    pub name: String,
}

/// A greeting.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct HelloReply {
    /// The greeting.
    #[prost(string, tag = "1")]
    pub message: String,
    /// The pod that greets.
    #[prost(string, tag = "2")]
    pub pod: String,
}

/// Asks for a count.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct CountRequest {
    /// Number of messages.
    #[prost(uint32, tag = "1")]
    pub to: u32,
    /// Pause between messages, in milliseconds.
    #[prost(uint32, tag = "2")]
    pub interval_ms: u32,
}

/// One step of a count.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CountReply {
    /// Counts from 0.
    #[prost(uint32, tag = "1")]
    pub index: u32,
    /// The pod that counts.
    #[prost(string, tag = "2")]
    pub pod: String,
}

/// A line of a chat.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ChatMessage {
    /// What is said.
    #[prost(string, tag = "1")]
    pub text: String,
    /// The pod that says it back.
    #[prost(string, tag = "2")]
    pub pod: String,
}

/// What protoc would write for `demo/greeter.proto`.
pub(super) fn file_descriptors() -> FileDescriptorSet {
    let file = FileDescriptorProto {
        name: Some("demo/greeter.proto".to_owned()),
        package: Some("demo".to_owned()),
        syntax: Some("proto3".to_owned()),
        message_type: vec![
            message("HelloRequest", &[("name", Type::String)]),
            message("HelloReply", &[("message", Type::String), ("pod", Type::String)]),
            message(
                "CountRequest",
                &[("to", Type::Uint32), ("interval_ms", Type::Uint32)],
            ),
            message("CountReply", &[("index", Type::Uint32), ("pod", Type::String)]),
            message("ChatMessage", &[("text", Type::String), ("pod", Type::String)]),
        ],
        service: vec![ServiceDescriptorProto {
            name: Some("Greeter".to_owned()),
            method: vec![
                method("Hello", "HelloRequest", "HelloReply", false, false),
                method("Count", "CountRequest", "CountReply", false, true),
                method("Chat", "ChatMessage", "ChatMessage", true, true),
            ],
            options: None,
        }],
        ..FileDescriptorProto::default()
    };
    FileDescriptorSet { file: vec![file] }
}

fn message(name: &str, fields: &[(&str, Type)]) -> DescriptorProto {
    let field = zip_numbers(fields)
        .map(|(number, &(name, kind))| FieldDescriptorProto {
            name: Some(name.to_owned()),
            json_name: Some(json_name(name)),
            number: Some(number),
            label: Some(Label::Optional.into()),
            r#type: Some(kind.into()),
            ..FieldDescriptorProto::default()
        })
        .collect();
    DescriptorProto {
        name: Some(name.to_owned()),
        field,
        ..DescriptorProto::default()
    }
}

fn zip_numbers<T>(items: &[T]) -> impl Iterator<Item = (i32, &T)> {
    (1..).zip(items)
}

fn json_name(name: &str) -> String {
    let mut upper = false;
    let mut json = String::new();
    for c in name.chars() {
        match c {
            '_' => upper = true,
            c if upper => {
                json.push(c.to_ascii_uppercase());
                upper = false;
            }
            c => json.push(c),
        }
    }
    json
}

fn method(name: &str, input: &str, output: &str, client: bool, server: bool) -> MethodDescriptorProto {
    MethodDescriptorProto {
        name: Some(name.to_owned()),
        input_type: Some(format!(".demo.{input}")),
        output_type: Some(format!(".demo.{output}")),
        options: None,
        client_streaming: Some(client),
        server_streaming: Some(server),
    }
}
