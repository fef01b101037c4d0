//! The kubeconfig text that leads to the double.

use k8s_openapi::ByteString;

/// The credentials part of a kubeconfig.
#[derive(Debug)]
pub(super) enum Credentials {
    /// A bearer token.
    Token(String),
    /// Client certificate and key, PEM.
    Certificate {
        /// Certificate.
        certificate: String,
        /// Private key.
        key: String,
    },
}

/// Renders a kubeconfig with one context, `fake`.
pub(super) fn render(server: &str, authority: &str, credentials: &Credentials) -> String {
    let authority = base64(authority);
    let user = match credentials {
        Credentials::Token(token) => format!("    token: \"{token}\"\n"),
        Credentials::Certificate { certificate, key } => format!(
            "    client-certificate-data: {}\n    client-key-data: {}\n",
            base64(certificate),
            base64(key)
        ),
    };
    format!(
        "apiVersion: v1\n\
         kind: Config\n\
         clusters:\n\
         - name: fake\n\
         \x20 cluster:\n\
         \x20   server: {server}\n\
         \x20   certificate-authority-data: {authority}\n\
         users:\n\
         - name: fake\n\
         \x20 user:\n\
         {user}\
         contexts:\n\
         - name: fake\n\
         \x20 context:\n\
         \x20   cluster: fake\n\
         \x20   user: fake\n\
         current-context: fake\n"
    )
}

fn base64(text: &str) -> String {
    // Kubernetes' own JSON form of bytes is base64, which saves a dependency.
    match serde_json::to_value(ByteString(text.as_bytes().to_vec())) {
        Ok(serde_json::Value::String(encoded)) => encoded,
        _ => String::new(),
    }
}
