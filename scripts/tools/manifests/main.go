// Checks Kubernetes objects on the standard input against the types of the API: an unknown or misplaced field, or a
// value of another type, is an error. Kinds that Kubernetes itself does not know are named and passed over.
package main

import (
	"bufio"
	"fmt"
	"io"
	"os"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
)

func main() {
	decoder := serializer.NewCodecFactory(scheme.Scheme, serializer.EnableStrict).UniversalDeserializer()
	documents := yaml.NewYAMLReader(bufio.NewReader(os.Stdin))
	checked, failed := 0, false
	for {
		document, err := documents.Read()
		if err == io.EOF {
			break
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "manifests:", err)
			os.Exit(1)
		}
		if content, err := yaml.ToJSON(document); err == nil && string(content) == "null" {
			continue
		}
		_, kind, err := decoder.Decode(document, nil, nil)
		switch {
		case runtime.IsNotRegisteredError(err):
			fmt.Println("manifests: not checked:", kind)
		case err != nil:
			fmt.Fprintf(os.Stderr, "manifests: %v: %v\n%s\n", kind, err, document)
			failed = true
		default:
			checked++
		}
	}
	if failed || checked == 0 {
		fmt.Fprintln(os.Stderr, "manifests: not all is as it should be")
		os.Exit(1)
	}
}
